"""SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17).

64-bit integers without sign; plain Python and NumPy, so that what must not import PyTorch can use it.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # added to the state for each output
STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # shifts to the right, and factors
LAST_SHIFT = 31


def mix(z: int) -> int:
    """The mixing function: a bijection whose results look random."""
    for shift, factor in STEPS:
        z = (z ^ z >> shift) * factor & MASK
    return z ^ z >> LAST_SHIFT


def mix_array(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of each element, as a new array."""
    for shift, factor in STEPS:
        z = (z ^ z >> np.uint64(shift)) * np.uint64(factor)
    return z ^ z >> np.uint64(LAST_SHIFT)


def outputs(seed: int) -> Iterator[int]:
    """The outputs of the generator for a seed, without end."""
    state = seed & MASK
    while True:
        state = state + GOLDEN_GAMMA & MASK
        yield mix(state)
