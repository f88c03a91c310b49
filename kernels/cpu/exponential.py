"""The exponential function for compiled kernels on a CPU."""

import math
from typing import Any

import numpy as np

from .compiled import compiled

_GREATEST = 87.0  # exp of it and of its negative are normal numbers of fp32


@compiled(fastmath=True)
def exp_fp32(x: Any) -> Any:
    """exp of a number in fp32 (Cephes, expf.c): vector instructions, unlike the library's.

    Numbers beyond 87 count as 87, either sign: of no use for what may be greater. Infinity and NaN give some number.
    """
    x = min(max(x, np.float32(-_GREATEST)), np.float32(_GREATEST))
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
