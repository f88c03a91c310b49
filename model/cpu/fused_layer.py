"""Whole layers of a Llama model on one CPU thread: two compiled calls, with the attention between them.

Letters of tensor shapes: T tokens, H heads, D head dimension, N width of the model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.cpu.layer_halves import has_layer_halves, heads_of_rows, rows_after_attention
from ...kernels.cpu.row_ops import compiles
from ..attention import attend_rows
from ..lean_imports import PreTrainedModel
from .fusion import FusedAttention, FusedNorm, GatedMlp
from .linear import HalfLinear
from .replacing import replace_modules


def fuse_layers(net: PreTrainedModel) -> None:
    """Replaces the layers that fit: fused and packed modules, no biases, no norms of queries and keys."""
    # On several threads they are not used, and would not be compared with what they replace.
    if torch.get_num_threads() == 1 and has_layer_halves():
        replace_modules(net, _is_llama_layer, FusedLayer)


class FusedLayer(nn.Module):
    """A layer of fused modules; it runs them one by one where PyTorch may use several threads."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        attention, mlp = layer.self_attn, layer.mlp
        self._layer, self._scale, self._rope = attention.layer_idx, attention.scaling, attention.rope
        self._queries, self._rotated = attention.query_heads, attention.query_heads + attention.kv_heads
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        heads = self._rotated + attention.kv_heads
        # Found again at each step, they would cost as much as a small operation.
        self._before = before.weight.numpy(), before.eps, attention.qkv_proj.panels, heads, self._rotated
        panels = (linear.panels for linear in (attention.o_proj, mlp.gate_up_proj, mlp.down_proj))
        self._after = after.weight.numpy(), after.eps, *panels

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        one_piece = compiles(hidden_states) and torch.get_num_threads() == 1
        if position_embeddings is None or not one_piece:
            return self.layer(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **options
            )
        x_TN = hidden_states[0]
        qkv_THD = heads_of_rows(x_TN, *self._before, *self._rope.prepared(*position_embeddings))
        q_THD, k_THD, v_THD = qkv_THD.tensor_split((self._queries, self._rotated), dim=1)
        attended_THD = attend_rows(self._layer, q_THD, k_THD, v_THD, self._scale, attention_mask, options)
        return rows_after_attention(x_TN, attended_THD, *self._after)[None]


def _is_llama_layer(module: Any) -> bool:
    children = dict(module.named_children())
    if set(children) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp, *norms = (
        children[name] for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    )
    fused = isinstance(attention, FusedAttention) and isinstance(mlp, GatedMlp) and mlp.is_silu
    if not fused or attention.q_norm is not None or not all(_is_fp32_norm(norm) for norm in norms):
        return False
    linear = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    return all(isinstance(layer, HalfLinear) and layer.bias is None for layer in linear)


def _is_fp32_norm(module: Any) -> bool:
    return isinstance(module, FusedNorm) and module.weight.dtype == torch.float32
