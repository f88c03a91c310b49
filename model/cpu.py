"""What makes a transformers model fast on a CPU without changing what it computes."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

# glibc, malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 30

# Rows that the weights are laid out for; other numbers of rows run on the same layout.
_TYPICAL_ROWS = 8
# Up to so many rows of fp32 the plain layout is as fast or faster.
_PLAIN_ROWS = 3


def speed_up(net: PreTrainedModel) -> None:
    """Prepares a loaded model on a CPU: fused and packed weights, memory that is kept. Outputs stay the same.

    Weights then lie in memory twice, but for those of bf16 that no embedding shares.
    """
    keep_freed_memory()
    with torch.inference_mode():
        fuse_gated_mlps(net)
        if torch.backends.mkldnn.is_available():
            pack_linear_layers(net)


def keep_freed_memory() -> None:
    """Has malloc keep what is freed, for this process; does nothing where malloc is not glibc's.

    Activations of a few MB are otherwise mapped and unmapped by every operation, and faulting their pages in costs
    more than computing them: 2 to 4 times the time of a norm or an activation function over 512 tokens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


class PackedLinear(nn.Module):
    """A linear layer whose weight also lies in oneDNN's blocked layout, which batches read faster."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_ROWS)
        plain_rows = _PLAIN_ROWS if linear.weight.dtype == torch.float32 else 0
        self._plain_values = plain_rows * linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= self._plain_values:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def pack_linear_layers(net: nn.Module) -> None:
    """Replaces the linear layers of a model by packed ones."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with one product for gate and up: one long read instead of two."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(gate.in_features, 2 * gate.out_features, bias=False, device="meta")
        self.gate_up_proj.weight = nn.Parameter(torch.cat((gate.weight, up.weight)), requires_grad=False)
        self.down_proj, self.act_fn = down, act

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def fuse_gated_mlps(net: nn.Module) -> None:
    """Replaces every MLP of the Llama kind whose fused form gives the same output on a probe."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            fused = _fused(child)
            if fused is not None:
                weight = fused.gate_up_proj.weight
                probe = torch.linspace(-1, 1, weight.shape[1]).to(weight.dtype)[None, None]
                if torch.allclose(fused(probe), child(probe), rtol=1e-2, atol=1e-4):
                    setattr(module, name, fused)


def _fused(module: nn.Module) -> GatedMlp | None:
    """The fused form of a module that has the children of a gated MLP and nothing else."""
    children = dict(module.named_children())
    if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    gate, up = children["gate_proj"], children["up_proj"]
    if type(gate) is not nn.Linear or type(up) is not nn.Linear or gate.weight.shape != up.weight.shape:
        return None
    if gate.bias is not None or up.bias is not None:
        return None
    return GatedMlp(gate, up, children["down_proj"], children["act_fn"])
