"""Policies that know nothing of time: what else one may choose, and what the cost model is compared with."""

from collections.abc import Callable, Mapping

import numpy as np

from .costs import Cached, Demand, column
from .worker_columns import NOBODY, Floats, Pool, Term

UNLIKE, UNLIKE_RATIO = 8, 1.5  # requests that one worker may have more than another, in number and ratio

Scores = Callable[[Demand, Pool, Cached], Floats]  # of one role's workers, with what they have cached


def _round_robin(demand: Demand, pool: Pool, cached: Cached) -> Floats:
    """Each worker in turn."""
    rows = np.arange(len(pool.addresses))
    there = pool.terms[Term.PENALTY] < NOBODY
    return np.where(there, (np.cumsum(there) - 1 - demand.number) % max(1, len(pool)), rows).astype(float)


def _least_requests(demand: Demand, pool: Pool, cached: Cached) -> Floats:
    """The one with the fewest requests, waiting and running."""
    return pool.requests


def _least_queued_tokens(demand: Demand, pool: Pool, cached: Cached) -> Floats:
    """The one with the fewest tokens ahead; of equals the one with more room."""
    return pool.queued + (1 - pool.pages_free / np.maximum(pool.pages_total, 1.0))


def _prefix_affinity(demand: Demand, pool: Pool, cached: Cached) -> Floats:
    """The one with the longest prefix, where that is half of the prompt and loads are not too unlike; else the one with
    the fewest requests. As the cache-aware policy of SGLang's router."""
    there = pool.requests[pool.terms[Term.PENALTY] < NOBODY]
    unlike = len(there) and there.max() > there.min() + UNLIKE and there.max() > UNLIKE_RATIO * there.min()
    if not cached or unlike:
        return pool.requests
    there = column(cached, len(pool.addresses))
    return pool.requests / 1e6 - np.where(2 * there >= demand.prompt_tokens, there, 0.0)


SIMPLE: Mapping[str, Scores] = {
    "round-robin": _round_robin,
    "least-requests": _least_requests,
    "least-queued-tokens": _least_queued_tokens,
    "prefix-affinity": _prefix_affinity,
}
