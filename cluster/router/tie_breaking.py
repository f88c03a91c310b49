"""Which of several workers of equal cost is chosen: the same one for prompts that begin alike, at every gateway.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998): the order of the
others stays when a worker goes. The hash is the mixing function of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .prefixes import FEW_ROWS

MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BITS_64 = 0xFFFFFFFFFFFFFFFF


def break_tie(rows: Sequence[int], seeds: Sequence[int], affinity: int) -> int:
    """The one of these rows with the least hash of its seed and the affinity (64 bits); `seeds` are those of all
    rows."""
    if len(rows) <= FEW_ROWS:
        return min([(mixed(seeds[row] ^ affinity), row) for row in rows])[1]
    known = np.array([seeds[row] for row in rows], dtype=np.uint64)
    return rows[int(_mixed_all(known ^ np.uint64(affinity)).argmin())]


def mixed(seed: int) -> int:
    """A hash of 64 bits."""
    seed = (seed ^ (seed >> 30)) * MIX_1 & BITS_64
    seed = (seed ^ (seed >> 27)) * MIX_2 & BITS_64
    return seed ^ (seed >> 31)


def _mixed_all(seeds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same for several; 64 bits wrap around by themselves."""
    seeds = (seeds ^ (seeds >> np.uint64(30))) * np.uint64(MIX_1)
    seeds = (seeds ^ (seeds >> np.uint64(27))) * np.uint64(MIX_2)
    return seeds ^ (seeds >> np.uint64(31))
