"""Linear layers on a CPU: the weight lies in a layout that small batches read faster.

Two layouts, by what the weight allows:

* half: where every weight fits into fp16 (weights that were bf16 do), it is kept so and multiplied in fp32
  (`kernels/half_gemm.py`). A small batch is bound by reading weights, and this halves the bytes and rounds nothing.
  Each row's sum has one order however many rows there are, so that a token's numbers do not depend on what else is in
  the batch; one that is computed again, alone or on another worker, comes out the same to the bit.
* blocked: oneDNN's own layout, of fp32 on any CPU and of bf16 on those that multiply bf16. Its last bits do depend on
  the number of rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.half_gemm import half_matmul, has_half_tiles, pack_half

# Rows that oneDNN lays weights out for; other numbers of rows run on the same layout.
_TYPICAL_ROWS = 8
# Up to so many rows of fp32 the plain layout is as fast as oneDNN's or faster.
_PLAIN_ROWS = 3
# What fp16 may change of a weight, in the norm: no more than fp32 itself rounds. A bf16 number fits into fp16 exactly
# but for those below 2^-17, of which a part of 2^-25 is lost.
_NEGLIGIBLE = 2.0**-24


class BlockedLinear(nn.Module):
    """A linear layer whose weight also lies in oneDNN's blocked layout."""

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


class HalfLinear(nn.Module):
    """A linear layer of fp32 whose weight is kept in fp16 and nowhere else; `fits_half` says whether it may."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.panels = pack_half(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out_TO = half_matmul(x.reshape(-1, self.in_features), self.panels, self.out_features)
        if self.bias is not None:
            out_TO += self.bias
        return out_TO.view(*x.shape[:-1], self.out_features)


def fits_half(weight: Tensor) -> bool:
    """Whether fp16 holds the values of an fp32 weight."""
    if weight.dtype != torch.float32 or not has_half_tiles():
        return False
    weight = weight.detach()
    least, greatest = weight.aminmax()
    if not max(-float(least), float(greatest)) <= torch.finfo(torch.float16).max:  # NaN is not
        return False
    return bool((weight.half().float() - weight).norm() <= _NEGLIGIBLE * weight.norm())


def pack_linear_layers(net: nn.Module) -> None:
    """Replaces the linear layers of a model by packed ones."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and (packed := packed_linear(child)) is not None:
                setattr(module, name, packed)


def packed_linear(linear: nn.Linear) -> nn.Module | None:
    """The packed form of a layer; None where there is none."""
    if fits_half(linear.weight):
        return HalfLinear(linear)
    return BlockedLinear(linear) if torch.backends.mkldnn.is_available() else None
