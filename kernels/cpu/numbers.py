"""Numbers in compiled code, which knows neither bf16 nor half floats as memory holds them, and an exponential function
of vector instructions."""

import math
from typing import Any

import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from .compiled import compiled

_HALF_MIN, _HALF_MAX = 2.0**-14, 65504.0
_MAX_EXPONENT = 87.0  # exp of it and of its negative are normal numbers of fp32


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
    """The bits of a finite fp32 `x` >= 0 in the format `scale16` (`pages/layout.py`)."""
    bits = np.float32(x).view(np.uint32)
    if x == 0:
        return np.uint16(0)
    if x >= np.float32(_HALF_MIN) and x <= np.float32(_HALF_MAX):
        rounded = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)
        return np.uint16(rounded - np.uint32(112 << 10))
    return np.uint16(bf16_bits(x) | np.uint16(0x8000))


@compiled()
def from_scale16_bits(bits):
    """fp32 of bits in the format `scale16` (`pages/layout.py`); infinity where no finite half float has them."""
    low = np.uint32(bits & np.uint16(0x7FFF))
    if bits & np.uint16(0x8000):
        return np.uint32(low << np.uint32(16)).view(np.float32)
    if low < np.uint32(0x400):  # a subnormal half float
        return np.float32(low) * np.float32(2.0**-24)
    if low >= np.uint32(0x7C00):
        return np.float32(np.inf)
    return np.uint32((low << np.uint32(13)) + np.uint32(112 << 23)).view(np.float32)


@compiled(fastmath=True)
def exp_fp32(x: Any) -> Any:
    """exp of a number in fp32 (Cephes, expf.c): vector instructions, unlike NumPy's.

    Numbers beyond 87 count as 87, either sign: of no use for what may be greater. Infinity and NaN give some number.
    """
    x = min(max(x, np.float32(-_MAX_EXPONENT)), np.float32(_MAX_EXPONENT))
    n = np.float32(math.floor(x * np.float32(1.44269504088896341) + np.float32(0.5)))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
