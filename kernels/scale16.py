"""scale16: a non-negative float in 16 bits that no finite float32 overflows.

Sign bit clear: the bits of a half float (11 bits of precision, 2^-14 to 65504). Sign bit set: the other 15
bits are those of a bfloat16 without its sign (8 bits of precision), for what lies outside of that range.
"""

import torch
from torch import Tensor

_HALF_MIN = 2.0**-14
_HALF_MAX = 65504.0
_BF16_MAX = 3.3895313892515355e38


def to_scale16(scale: Tensor) -> Tensor:
    """int16 bits of float32 scales >= 0, same shape. Values over the largest bfloat16 become that."""
    half = scale.to(torch.float16).view(torch.int16)
    least, most = scale.aminmax() if scale.numel() else (scale.new_ones(()),) * 2
    if least.item() >= _HALF_MIN and most.item() <= _HALF_MAX:
        return half
    usual = (scale >= _HALF_MIN) & (scale <= _HALF_MAX)
    wide = scale.clamp(max=_BF16_MAX).to(torch.bfloat16).view(torch.int16)
    return torch.where(usual | (scale == 0), half, wide | -0x8000)


def from_scale16(bits: Tensor) -> Tensor:
    """float32 of int16 bits, same shape."""
    half = bits.view(torch.float16).to(torch.float32)
    if not bits.numel() or bits.amin().item() >= 0:
        return half
    wide = (bits & 0x7FFF).view(torch.bfloat16).to(torch.float32)
    return torch.where(bits < 0, wide, half)
