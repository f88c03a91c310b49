"""What a request with a deadline has to expect: pure, from the board. None where nobody has measured yet."""

from dataclasses import dataclass

import numpy as np

from ...proto.errors import InvalidRequest, Unavailable
from ..gateway_config import LocalPrefill
from .costs import Demand, cached_tokens, compute_weights, save
from .router import route
from .routing_table import Board
from .worker_columns import COMPUTE, SUSPECT, Pool, Term


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Seconds."""

    ttft_s: float = 0.0  # at the best placement now, once it is let in
    idle_ttft_s: float = 0.0  # the same if nothing else ran: no retry does better
    finish_s: float = 0.0  # at the earliest, if nothing else ran; of what the request insists on


def expected(demand: Demand, board: Board, *, insists: int, local_prefill: LocalPrefill) -> Expected | None:
    """What a request has to expect that ends after no less than `insists` tokens of output.

    None where no worker has measured its speed, where only suspects are left, or where nothing can be placed now: an
    estimate without measurements refuses nobody.
    """
    if not board.measured:
        return None
    try:
        placement = route(demand, board, local_prefill=local_prefill)
    except (Unavailable, InvalidRequest):
        return None
    pools = [board.prefill] * (local_prefill != "always") + [board.decode] * (local_prefill != "never")
    idle_ms = min(_idle_ms(demand, pool) for pool in pools if pool.row)
    if max(placement.ttft_ms, idle_ms) >= SUSPECT:
        return None
    step_ms = min((load.step.ms for load in board.decode if load.step is not None), default=0.0)
    finish_ms = idle_ms + max(0, insists - 1) * step_ms
    return Expected(ttft_s=placement.ttft_ms / 1e3, idle_ttft_s=idle_ms / 1e3, finish_s=finish_ms / 1e3)


def _idle_ms(demand: Demand, pool: Pool) -> float:
    """Computing what is not cached, where that is fastest."""
    costs = np.array(compute_weights(demand)).dot(pool.terms[COMPUTE])
    save(costs, demand, pool, cached_tokens(pool, demand))
    return float((costs + pool.terms[Term.PENALTY]).min())
