"""Numbers as memory holds them, for compiled code, which knows neither bf16 nor half floats."""

import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from .compiled import compiled

_HALF_MIN, _HALF_MAX = 2.0**-14, 65504.0


def np_view(x: Tensor) -> np.ndarray:
    """The same memory for Numba; bf16 as the 16 bits that it is."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def number(x):
    """A stored number (fp32, or the bits of bf16) as fp32."""
    raise NotImplementedError("compiled code only")


@overload(number, inline="always")
def _number_overload(x):
    if str(x) == "uint16":
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def stored(x, like):
    """fp32 as it is stored in an array like `like`: fp32, or the bits of bf16."""
    raise NotImplementedError("compiled code only")


@overload(stored, inline="always")
def _stored_overload(x, like):
    if str(like.dtype) == "uint16":
        return lambda x, like: bf16_bits(x)
    return lambda x, like: x


@compiled()
def bf16_bits(x):
    """The bits of fp32 `x`, not NaN, rounded to the nearest bf16, ties to even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@compiled()
def scale16_bits(x):
    """The bits of a finite fp32 `x` >= 0 in the format of `kernels/scale16.py`."""
    bits = np.float32(x).view(np.uint32)
    if x == 0:
        return np.uint16(0)
    if x >= np.float32(_HALF_MIN) and x <= np.float32(_HALF_MAX):
        rounded = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)
        return np.uint16(rounded - np.uint32(112 << 10))
    return np.uint16(bf16_bits(x) | np.uint16(0x8000))


@compiled()
def from_scale16_bits(bits):
    """fp32 of bits in the format of `kernels/scale16.py`; infinity where they are those of no finite half float."""
    low = np.uint32(bits & np.uint16(0x7FFF))
    if bits & np.uint16(0x8000):
        return np.uint32(low << np.uint32(16)).view(np.float32)
    if low < np.uint32(0x400):  # a subnormal half float
        return np.float32(low) * np.float32(2.0**-24)
    if low >= np.uint32(0x7C00):
        return np.float32(np.inf)
    return np.uint32((low << np.uint32(13)) + np.uint32(112 << 23)).view(np.float32)
