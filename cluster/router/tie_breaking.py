"""Which of several workers of equal cost is chosen: the same one for prompts that begin alike, at every gateway.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998): the order of the
others stays when a worker goes. Mixed as in SplitMix64.
"""

from collections.abc import Sequence

import numpy as np

from ...kernels.splitmix64 import mix, mix_array
from .prefixes import FEW_ROWS


def break_tie(rows: Sequence[int], seeds: Sequence[int], affinity: int) -> int:
    """The one of these rows with the least hash of its seed and the affinity (64 bits); `seeds` are those of all
    rows."""
    if len(rows) <= FEW_ROWS:
        return min([(mix(seeds[row] ^ affinity), row) for row in rows])[1]
    known = np.array([seeds[row] for row in rows], dtype=np.uint64)
    return rows[int(mix_array(known ^ np.uint64(affinity)).argmin())]
