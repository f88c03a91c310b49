"""Random numbers by counter: the number for a token at a place in a sequence depends on (seed, place, token) alone.

So a request that is replayed elsewhere, or in another batch, draws what it drew before. The mixing function is that of
SplitMix64 (`kernels/splitmix64.py`); the seed is mixed before the place is added, and the place before the token, so
that neighbouring seeds or places do not give one sequence shifted against another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.splitmix64 import GOLDEN_GAMMA, LAST_SHIFT, MASK, STEPS, mix

_BLOCK = 1 << 16  # numbers made at once: more do not stay in a core's cache
_BELOW_ONE = 1 - 2.0**-24  # the greatest float32 below 1


def place_key(seed: int, position: int) -> int:
    """64 random bits for one place of a sequence."""
    return mix(mix(seed + GOLDEN_GAMMA & MASK) + (position + 1) * GOLDEN_GAMMA & MASK)


def gumbel(keys: Sequence[int], token_RK: Tensor) -> Tensor:
    """Numbers [R, K], float32, of the standard Gumbel distribution for tokens [R, K] or [1, K] at the places `keys`."""
    key_R1 = torch.tensor([_signed(key) for key in keys], device=token_RK.device)[:, None]
    token_RK = token_RK.expand(len(keys), -1)
    rows = max(1, _BLOCK // token_RK.shape[1])
    return torch.cat([_gumbel(*block) for block in zip(key_R1.split(rows), token_RK.split(rows), strict=True)])


def _gumbel(key_R1: Tensor, token_RK: Tensor) -> Tensor:
    bits_RK = _mix_all((token_RK + 1) * _signed(GOLDEN_GAMMA) + key_R1)
    # A number in (0, 1) with full relative precision near 0, where the greatest Gumbel numbers come from.
    uniform_RK = _shifted(bits_RK, 32).float().add_(0.5).mul_(2.0**-32).clamp_max_(_BELOW_ONE)
    return uniform_RK.neg_().log1p_().neg_().log_().neg_()


def _mix_all(z: Tensor) -> Tensor:
    """`mix` of 64-bit integers, in place: products of two's complement numbers wrap as those without sign do."""
    for shift, factor in STEPS:
        z ^= _shifted(z, shift)
        z *= _signed(factor)
    z ^= _shifted(z, LAST_SHIFT)
    return z


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros, as numbers without sign have it."""
    return (z >> bits).bitwise_and_((1 << 64 - bits) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
