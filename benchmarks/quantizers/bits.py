"""Pieces that the published quantizers share: a bit stream, a seeded matrix, scalar quantizers."""

import math
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from isthmus.kernels.splitmix64 import outputs

# Lloyd-Max points of N(0, 1), the positive half (Max 1960, and Newton's method to the digits shown).
LLOYD_MAX: dict[int, tuple[float, ...]] = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560052, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423404, 1.2562312, 1.6180464, 2.0690173, 2.7326357),
}


def to_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] below 2^bits -> uint8 [..., n * bits / 8], a little-endian bit stream; n * bits % 8 == 0."""
    stream = codes.to(torch.int32)[..., None] >> torch.arange(bits) & 1
    return (stream.flatten(-2).unflatten(-1, (-1, 8)) << torch.arange(8)).sum(-1).to(torch.uint8)


def from_bits(stream: Tensor, bits: int) -> Tensor:
    """The inverse of `to_bits`: int64 codes [..., n]."""
    single = stream.to(torch.int32)[..., None] >> torch.arange(8) & 1
    return (single.flatten(-2).unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)


@cache
def points(bits: int) -> Tensor:
    """float64 [2^bits], ascending: Lloyd-Max points of a normal variable."""
    half = LLOYD_MAX[bits]
    return torch.tensor([-p for p in reversed(half)] + list(half), dtype=torch.float64)


def nearest(y: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of ascending levels."""
    return torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)


@cache
def gaussian(seed: int, dim: int) -> Tensor:
    """float64 [dim, dim] of N(0, 1): Box-Muller over the outputs of splitmix64, row by row."""
    bits, pairs = islice(outputs(seed), 2 * ((dim * dim + 1) // 2)), list[float]()
    for first, second in zip(bits, bits, strict=True):
        radius = math.sqrt(-2 * math.log(((first >> 11) + 0.5) * 2.0**-53))
        angle = 2 * math.pi * ((second >> 11) + 0.5) * 2.0**-53
        pairs += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(pairs[: dim * dim], dtype=torch.float64).view(dim, dim)
