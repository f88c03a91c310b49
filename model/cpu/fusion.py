"""Modules of transformers in fewer operations, on any device.

Letters of tensor shapes: T tokens, H heads, D head dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.cpu.row_ops import compiles, gated_silu, rms_norm, rotate_heads, rotate_reference
from ..attention import attend_rows
from ..lean_imports import PreTrainedModel
from .replacing import Make, close, replace_modules


def fuse(net: PreTrainedModel) -> None:
    """Replaces what can be replaced; outputs stay the same within rounding."""
    replace_modules(net, _is_norm, _fused_norm)
    replace_modules(net, _is_mlp, _fused_mlp)
    replace_modules(net, _is_attention, _make_attention(Rope()))


class FusedNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps, self._shape = eps, tuple(weight.shape)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if compiles(hidden_states):
            return rms_norm(hidden_states, self.weight, self.eps)
        return F.rms_norm(hidden_states, self._shape, self.weight, self.eps)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and isinstance(_eps(module), float)
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _fused_norm(module: Any) -> nn.Module | None:
    """Gemma's scale is 1 + weight."""
    weight = module.weight.data
    probe = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None]
    for scale in (weight, 1 + weight):
        fused = FusedNorm(scale, _eps(module))
        if close(module(probe), fused(probe)):
            return fused
    return None


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with one product for gate and up: one long read instead of two."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = _joined(gate, up)
        self.down_proj, self.act_fn = down, act
        probe = torch.linspace(-9, 9, 64, dtype=gate.weight.dtype, device=gate.weight.device)
        self.is_silu = torch.equal(act(probe), F.silu(probe))

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x)
        if self.is_silu and compiles(gate_up):
            return self.down_proj(gated_silu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def _is_mlp(module: Any) -> bool:
    """Whether it has the children of a gated MLP and nothing else."""
    children = set(dict(module.named_children()))
    return children == {"gate_proj", "up_proj", "down_proj", "act_fn"} and _joins(module.gate_proj, module.up_proj)


def _fused_mlp(module: Any) -> nn.Module:
    return GatedMlp(module.gate_proj, module.up_proj, module.down_proj, module.act_fn)


def _joins(*layers: nn.Module) -> bool:
    """Whether plain linear layers can be one."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    return len({(layer.bias is None, layer.weight.dtype, layer.in_features) for layer in layers}) == 1  # type: ignore


def _joined(*layers: nn.Linear) -> nn.Linear:
    """One layer whose outputs are those of the layers, side by side."""
    first = layers[0]
    joined = nn.Linear(
        first.in_features, sum(layer.out_features for layer in layers), bias=first.bias is not None, device="meta"
    )
    joined.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if first.bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return joined


class Rope:
    """Rotary embeddings of one step (Su et al., arXiv 2104.09864), prepared once for all layers.

    The second half of a head turns with the first: x * cos + swapped(x) * sin, where the sine of the first half has
    its sign changed.
    """

    def __init__(self) -> None:
        self._cos: Tensor | None = None
        self._prepared: tuple[Tensor, Tensor] | None = None

    def __call__(self, x_THD: Tensor, heads: int, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
        """The first `heads` heads, rotated; `x_THD` may be overwritten."""
        cos_TD, sin_TD = self.prepared(cos_1TD, sin_1TD)
        if compiles(x_THD) and compiles(cos_TD) and cos_TD.shape[-1] == x_THD.shape[-1]:
            rotate_heads(x_THD, heads, cos_TD, sin_TD)
            return x_THD[:, :heads]
        return rotate_reference(x_THD[:, :heads], cos_TD, sin_TD)

    def prepared(self, cos_1TD: Tensor, sin_1TD: Tensor) -> tuple[Tensor, Tensor]:
        """Both as [T, D] in one piece, the sine with its signs."""
        if self._prepared is None or self._cos is not cos_1TD:
            half = sin_1TD.shape[-1] // 2
            signed = torch.cat((-sin_1TD[..., :half], sin_1TD[..., half:]), dim=-1)
            self._cos, self._prepared = cos_1TD, (cos_1TD[0].contiguous(), signed[0])
        return self._prepared


class FusedAttention(nn.Module):
    """Self-attention with one product for q, k and v, and one rotation for q and k."""

    def __init__(self, module: Any, rope: Rope) -> None:
        super().__init__()
        self.qkv_proj = _joined(module.q_proj, module.k_proj, module.v_proj)
        self.o_proj = module.o_proj
        self.q_norm, self.k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        self.config, self.layer_idx = module.config, module.layer_idx
        self.scaling, self.head_dim = module.scaling, module.head_dim
        self.query_heads, self.kv_heads = (
            layer.out_features // self.head_dim for layer in (module.q_proj, module.k_proj)
        )
        self.rope = rope

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if past_key_values is not None:
            raise ValueError("the KV cache is the caller's here")
        rotated, queries = self.query_heads + self.kv_heads, self.query_heads
        qkv_THD = self.qkv_proj(hidden_states).view(hidden_states.shape[1], -1, self.head_dim)
        qk_THD, v_THD = qkv_THD, qkv_THD[:, rotated:]
        if self.q_norm is not None and self.k_norm is not None:
            qk_THD = torch.cat((self.q_norm(qkv_THD[:, :queries]), self.k_norm(qkv_THD[:, queries:rotated])), dim=1)
        qk_THD = self.rope(qk_THD, rotated, *position_embeddings)
        heads = qk_THD[:, :queries], qk_THD[:, queries:], v_THD
        out_THD = attend_rows(self.layer_idx, *heads, self.scaling, attention_mask, options)
        return self.o_proj(out_THD.reshape(*hidden_states.shape[:-1], -1)), None


def _is_attention(module: Any) -> bool:
    """Whether it has the children and attributes of a Llama or Qwen3 attention layer and no other children."""
    plain = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if set(dict(module.named_children())) not in (plain, plain | {"q_norm", "k_norm"}):
        return False
    if not all(hasattr(module, name) for name in ("config", "layer_idx", "scaling", "head_dim")):
        return False
    return _joins(module.q_proj, module.k_proj, module.v_proj)


def _make_attention(rope: Rope) -> Make:
    return lambda module: FusedAttention(module, rope)
