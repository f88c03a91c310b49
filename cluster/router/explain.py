"""The router's table for one request: what each pair of workers would cost, part by part."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..gateway_config import LocalPrefill
from .costs import (
    ITL_WEIGHT,
    LOCAL_MARGIN,
    Cached,
    Demand,
    all_weights,
    cached_tokens,
    compute_weights,
    exposed_ms,
    own_ms,
    queue_weights,
    save,
    wait_ms,
)
from .router import Placement, allowed_workers
from .routing_table import Board
from .worker_columns import COMPUTE, NOBODY, QUEUE, Floats, Pool

DECODES, PREFILLS = 4, 8  # that the table shows, the cheapest of each


class Price(NamedTuple):
    """One line: as `Candidate` of the wire."""

    decode: str
    prefill: str
    wait_ms: float
    steps_ms: float
    queue_ms: float
    compute_ms: float
    transfer_ms: float
    damage_ms: float
    total_ms: float
    cached_tokens: int
    held_tokens: int
    chosen: bool


def explain(demand: Demand, board: Board, placement: Placement, *, local_prefill: LocalPrefill) -> list[Price]:
    """The prices of the cheapest pairs, the chosen one among them, and of local prefill where it is allowed."""
    _, may_decode, _ = allowed_workers(demand, board, local_prefill=local_prefill)
    pool = board.decode
    wait = wait_ms(board, demand)
    own = np.array(own_ms(all_weights(demand, board.output_tokens), pool)) + (0.0 if wait is None else wait)
    if may_decode is not None:
        own += may_decode
    rows = [int(row) for row in np.argsort(own, kind="stable")[:DECODES] if own[row] < NOBODY]
    chosen = pool.row[placement.decode]
    lines = []
    for row in dict.fromkeys([chosen, *rows]):
        lines += _lines(demand, board, row, float(own[row]), 0.0 if wait is None else float(wait[row]), local_prefill)
    picked = (placement.decode, placement.prefill[0] if placement.prefill else "")
    lines = [line._replace(chosen=(line.decode, line.prefill) == picked) for line in lines]
    return sorted(lines, key=lambda line: (line.total_ms, not line.chosen))


def _lines(
    demand: Demand, board: Board, row: int, own_ms: float, wait: float, local_prefill: LocalPrefill
) -> Iterator[Price]:
    """One decode worker with each prefill worker, and alone."""
    held = cached_tokens(board.decode, demand)
    held_here = held.get(row, 0.0)
    shared = {"decode": board.decode.addresses[row], "wait_ms": wait, "steps_ms": own_ms - wait}
    shared |= {"held_tokens": round(held_here), "chosen": False}
    if local_prefill != "always":
        pool, kinds = board.prefill, board.offer(demand.codec)
        cached = cached_tokens(pool, demand)
        queue = np.dot(queue_weights(demand), pool.terms[QUEUE])
        compute = _compute_ms(demand, pool, cached)
        sent = exposed_ms(demand, board, held_here, board.links(row), queue + compute) if len(pool) else compute
        total = own_ms + queue + compute + sent
        fits = (kinds.prefill == kinds.decode[row]) & (pool.capacity >= demand.prompt_tokens) & (total < NOBODY)
        for prefill in [int(one) for one in np.argsort(total, kind="stable") if fits[one]][:PREFILLS]:
            yield Price(
                **shared,
                prefill=pool.addresses[prefill],
                queue_ms=float(queue[prefill]),
                compute_ms=float(compute[prefill]),
                transfer_ms=float(sent[prefill]),
                damage_ms=0.0,
                total_ms=float(total[prefill]),
                cached_tokens=round(cached.get(prefill, 0.0)),
            )
    if local_prefill != "never":
        compute_here = float(_compute_ms(demand, board.decode, held)[row])
        requests = float(board.decode.requests[row])
        damage = ITL_WEIGHT * demand.damage * requests * compute_here
        yield Price(
            **shared,
            prefill="",
            queue_ms=0.0,
            compute_ms=compute_here,
            transfer_ms=0.0,
            damage_ms=damage,
            total_ms=own_ms + LOCAL_MARGIN * compute_here + damage,
            cached_tokens=round(held_here),
        )


def _compute_ms(demand: Demand, pool: Pool, cached: Cached) -> Floats:
    """What is not cached, on each worker."""
    costs = np.dot(compute_weights(demand), pool.terms[COMPUTE])
    save(costs, demand, pool, cached)
    return costs
