"""Centroids of the packed codes: Lloyd-Max points of a normal distribution, as odd 8-bit integers.

Odd integers c = 2 v - 127 with v in 0..127: the midpoints between neighbours are integers (so the nearest
centroid is decided by floor(y) in 8 bits), sums of centroids are exact in fp32 and bf16 holds each of them
exactly, and v is 7 bits wide, which lets a GPU look four codes up with two byte permutations
(`dequant_triton.py`). Mean squared error over that of the real Lloyd-Max points: -.01 % (the integers are optimal
to the last digit), +.05 %, +.34 % at 2, 3 and 4 bits.

Codes ascend: code 0 is the most negative centroid.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

MAGNITUDES: dict[int, tuple[int, ...]] = {
    2: (29, 97),
    3: (13, 41, 73, 117),
    4: (5, 15, 25, 37, 49, 63, 81, 107),
}
CODE_BITS = tuple(MAGNITUDES)


@cache
def centroids(bits: int) -> tuple[int, ...]:
    """All 2^bits centroids, ascending."""
    magnitudes = MAGNITUDES[bits]
    return tuple(-m for m in reversed(magnitudes)) + magnitudes


@cache
def unit(bits: int) -> float:
    """One standard deviation of a normal variable, in centroid units, where the quantizer's error is
    least."""
    return {2: 64.2110, 3: 54.3470, 4: 39.1247}[bits]


@cache
def magnitude_steps(bits: int) -> tuple[int, ...]:
    """Seven midpoints between the magnitudes of neighbouring centroids, ascending, the least magnitude, and seven
    steps from a magnitude to the next one; for less than 4 bits the last midpoints are 127 and the last steps 0."""
    magnitudes = MAGNITUDES[bits]
    pairs = list(pairwise(magnitudes))
    missing = 7 - len(pairs)
    middle = [(a + b) // 2 for a, b in pairs] + [127] * missing
    return (*middle, magnitudes[0], *(b - a for a, b in pairs), *([0] * missing))


@cache
def pair_table(bits: int) -> Tensor:
    """What two values a and b become, by the bytes of floor(a) (low) and floor(b), two's complement, each clamped.

    int32 [65536] of four bytes: code of a | code of b << 4; k modulo 64; k / 64; 0, where the sum of the squares of
    both centroids is 8 k + 2 (they are odd). `pair_weights` adds k up.
    """
    points = torch.tensor(centroids(bits), dtype=torch.float32)
    midpoints = (points[1:] + points[:-1]) / 2
    grid = torch.arange(256, dtype=torch.uint8).view(torch.int8).to(torch.float32)
    code = torch.bucketize(grid, midpoints, right=True).to(torch.int32)  # floor(y) >= m exactly when y >= m
    square = points[code.long()].square().to(torch.int32)
    k = (square[None, :] + square[:, None] - 2) // 8
    return (code[None, :] | code[:, None] << 4 | (k & 63) << 8 | k >> 6 << 16).flatten().contiguous()


@cache
def pair_weights(pairs: int) -> Tensor:
    """int8 [4 pairs, 1]: what the bytes of `pair_table` count for in the sum of k."""
    return torch.tensor([[0], [1], [64], [0]], dtype=torch.int8).repeat(pairs, 1)


@cache
def quad_table(bits: int) -> Tensor:
    """Four centroids, int8 each, in an int32; by two neighbouring bytes of codes (4 bits: int32 [65536]), by a byte
    (2 bits: [256]), or by a byte and above it the nibble of its high bits (3 bits: [4096]).

    At 4 bits they are those of the first byte's low and high nibble, then the second's; else those of the groups.
    """
    points = torch.tensor(centroids(bits), dtype=torch.int8)
    index = torch.arange({4: 65536, 3: 4096, 2: 256}[bits])
    if bits == 4:
        codes = [index >> (4 * i) & 15 for i in range(4)]
    else:
        codes = [(index >> (2 * i) & 3) | (index >> (8 + i) & 1) << 2 for i in range(4)]
    return torch.stack([points[code] for code in codes], 1).view(torch.int32).flatten()
