"""How long a request with a deadline will take: pure, from the routing table. None where nothing is measured yet."""

from dataclasses import dataclass

import numpy as np

from ...proto.errors import InvalidRequest, Unavailable
from .costs import Demand, cached_tokens, compute_weights, save
from .policies import LocalPrefill
from .router import route
from .routing_table import RoutingTable
from .worker_columns import COMPUTE, SUSPECT, Term, WorkerColumns


@dataclass(frozen=True, kw_only=True)
class LatencyEstimate:
    """Seconds."""

    ttft_s: float = 0.0  # at the best placement now, from the moment at which the request may start
    idle_ttft_s: float = 0.0  # the same if nothing else ran: no retry does better
    finish_s: float = 0.0  # at the earliest, if nothing else ran; of the least output that the request demands


def estimate_latency(
    demand: Demand, table: RoutingTable, *, min_output_tokens: int, local_prefill: LocalPrefill
) -> LatencyEstimate | None:
    """An estimate for a request that ends after no less than `min_output_tokens`.

    None where no worker has measured its speed, where only suspects are left, or where nothing can be placed now: an
    estimate without measurements refuses nobody.
    """
    if not table.measured:
        return None
    try:
        placement = route(demand, table, local_prefill=local_prefill)
    except (Unavailable, InvalidRequest):
        return None
    roles = [table.prefill] * (local_prefill != "always") + [table.decode] * (local_prefill != "never")
    idle_ms = min(_idle_ms(demand, workers) for workers in roles if len(workers))
    if max(placement.ttft_ms, idle_ms) >= SUSPECT:
        return None
    step_ms = min((load.step.ms for load in table.decode if load.step is not None), default=0.0)
    finish_ms = idle_ms + max(0, min_output_tokens - 1) * step_ms
    return LatencyEstimate(ttft_s=placement.ttft_ms / 1e3, idle_ttft_s=idle_ms / 1e3, finish_s=finish_ms / 1e3)


def _idle_ms(demand: Demand, workers: WorkerColumns) -> float:
    """The time to compute what is not cached, on the fastest worker."""
    costs = np.array(compute_weights(demand)).dot(workers.terms[COMPUTE])
    save(costs, demand, workers, cached_tokens(workers, demand))
    return float((costs + workers.terms[Term.PENALTY]).min())
