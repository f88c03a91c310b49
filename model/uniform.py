"""Random numbers by counter: the number for a place in a sequence depends on (seed, place) alone.

So a request that is replayed elsewhere, or in another batch, draws what it drew before. The mixing function is that of
SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17); the seed
is mixed before the place is added, so that neighbouring seeds do not give one sequence shifted against another.
"""

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1 - 2^-52] for one place; a multiple of 2^-52."""
    mixed = _mix(seed + _GOLDEN_GAMMA & _MASK)
    return (_mix(mixed + (position + 1) * _GOLDEN_GAMMA & _MASK) >> 12) * 2.0**-52


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
