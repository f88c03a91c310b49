"""Routing policies without a cost model: what else one may choose, and what the cost model is compared with."""

from collections.abc import Callable, Mapping

import numpy as np

from .costs import Cached, Demand, dense
from .worker_columns import EXCLUDED, Floats, Term, WorkerColumns

IMBALANCE, IMBALANCE_RATIO = 8, 1.5  # requests that one worker may have more than another, in number and ratio

Scores = Callable[[Demand, WorkerColumns, Cached], Floats]  # of one role's workers, with what they have cached


def _round_robin(demand: Demand, workers: WorkerColumns, cached: Cached) -> Floats:
    """Each worker in turn."""
    rows = np.arange(len(workers.addresses))
    present = workers.terms[Term.PENALTY] < EXCLUDED
    return np.where(present, (np.cumsum(present) - 1 - demand.number) % max(1, len(workers)), rows).astype(float)


def _least_requests(demand: Demand, workers: WorkerColumns, cached: Cached) -> Floats:
    """The one with the fewest requests, waiting and running."""
    return workers.requests


def _least_queued_tokens(demand: Demand, workers: WorkerColumns, cached: Cached) -> Floats:
    """The one with the fewest tokens ahead; of equals the one with more room."""
    return workers.queued + (1 - workers.pages_free / np.maximum(workers.pages_total, 1.0))


def _prefix_affinity(demand: Demand, workers: WorkerColumns, cached: Cached) -> Floats:
    """The one with the longest prefix, where that is half of the prompt and loads are balanced; else the one with the
    fewest requests. As the cache-aware policy of SGLang's router."""
    counts = workers.requests[workers.terms[Term.PENALTY] < EXCLUDED]
    least, most = counts.min(initial=np.inf), counts.max(initial=0.0)
    if not cached or (most > least + IMBALANCE and most > IMBALANCE_RATIO * least):
        return workers.requests
    tokens = dense(cached, len(workers.addresses))
    return workers.requests / 1e6 - np.where(2 * tokens >= demand.prompt_tokens, tokens, 0.0)


SIMPLE: Mapping[str, Scores] = {
    "round-robin": _round_robin,
    "least-requests": _least_requests,
    "least-queued-tokens": _least_queued_tokens,
    "prefix-affinity": _prefix_affinity,
}
