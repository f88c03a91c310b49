"""Linear layers on a CPU: the weight lies in a layout that small batches read faster.

Two layouts, by what the weight allows and the machine does; where it does neither, a layer stays as it is:

* half: where every weight fits into fp16 (weights that were bf16 do), it is kept so and multiplied in fp32
  (`kernels/cpu/half_gemm.py`). A small batch is bound by reading weights, and this halves the bytes and rounds nothing.
  Each row's sum has one order however many rows there are, so that a token's numbers do not depend on what else is in
  the batch; one that is computed again, alone or on another worker, comes out the same to the bit.
* blocked: oneDNN's own layout, of fp32 and bf16. Its last bits do depend on the number of rows.
"""

import logging
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.cpu.half_gemm import half_matmul, has_half_tiles, pack_half
from ...kernels.fast_paths import FastPath, alike, spread

log = logging.getLogger(__name__)

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
        self.weight = linear.weight
        self.bias: nn.Parameter | None = linear.bias
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
            if type(child) is not nn.Linear:
                continue
            try:
                packed = packed_linear(child)
            except RuntimeError as error:  # of a library, for a shape that it does not have; one line for the layer
                log.warning("the linear layer %s stays as it is: %s", name, str(error).partition("\n")[0])
                continue
            if packed is not None:
                setattr(module, name, packed)


def packed_linear(linear: nn.Linear) -> nn.Module | None:
    """The packed form of a layer; None where there is none."""
    if fits_half(linear.weight):
        return HalfLinear(linear)
    return BlockedLinear(linear) if has_blocked(linear.weight.dtype) else None


def has_blocked(dtype: torch.dtype) -> bool:
    """Whether weights of that dtype are kept in oneDNN's layout; the first call tries it."""
    path = _BLOCKED.get(dtype)
    return path is not None and path()


def _works(dtype: torch.dtype) -> bool:
    """With a bias and without, more rows than are left to the plain layout."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    x, weight, linear = spread(_TYPICAL_ROWS + 1, 24, dtype=dtype), spread(10, 24, dtype=dtype), nn.Linear(24, 10)
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(spread(10, dtype=dtype))
    with torch.inference_mode():
        packed = BlockedLinear(linear)
        same = alike(packed(x), linear(x), tolerance)
        packed.bias = None
        return same and alike(packed(x), F.linear(x, weight), tolerance)


_BLOCKED = {
    dtype: FastPath(f"oneDNN's layout of {name} weights", partial(_works, dtype))
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}
