"""What each pair of workers would cost for one request, part by part."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

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
from .policies import LocalPrefill
from .router import Placement, allowed_workers
from .routing_table import RoutingTable
from .worker_columns import COMPUTE, EXCLUDED, QUEUE, Floats, WorkerColumns

DECODES, PREFILLS = 4, 8  # that are shown, the cheapest of each


class Price(NamedTuple):
    """One pair, or a decode worker alone (`prefill` is ""): as `Candidate` of the wire."""

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


def explain(demand: Demand, table: RoutingTable, placement: Placement, *, local_prefill: LocalPrefill) -> list[Price]:
    """The prices of the cheapest pairs, the chosen one among them, and of local prefill where it is allowed."""
    _, may_decode, _ = allowed_workers(demand, table, local_prefill=local_prefill)
    workers = table.decode
    wait = wait_ms(table, demand)
    own = np.array(own_ms(all_weights(demand, table.output_tokens), workers)) + (0.0 if wait is None else wait)
    if may_decode is not None:
        own += may_decode
    rows = [int(row) for row in np.argsort(own, kind="stable")[:DECODES] if own[row] < EXCLUDED]
    chosen = workers.row_of[placement.decode]
    prices: list[Price] = []
    for row in dict.fromkeys([chosen, *rows]):
        waits = 0.0 if wait is None else float(wait[row])
        prices += _prices(demand, table, row, float(own[row]), waits, local_prefill)
    picked = (placement.decode, placement.prefill[0] if placement.prefill else "")
    prices = [price._replace(chosen=(price.decode, price.prefill) == picked) for price in prices]
    return sorted(prices, key=lambda price: (price.total_ms, not price.chosen))


def _prices(
    demand: Demand, table: RoutingTable, row: int, own_ms: float, wait: float, local_prefill: LocalPrefill
) -> Iterator[Price]:
    """One decode worker with each prefill worker, and alone."""
    decode_cached = cached_tokens(table.decode, demand)
    cached_here = decode_cached.get(row, 0.0)
    shared = {"decode": table.decode.addresses[row], "wait_ms": wait, "steps_ms": own_ms - wait}
    shared |= {"held_tokens": round(cached_here), "chosen": False}
    if local_prefill != "always":
        workers, support = table.prefill, table.codec_support(demand.codec)
        cached = cached_tokens(workers, demand)
        queue = np.dot(queue_weights(demand), workers.terms[QUEUE])
        compute = _compute_ms(demand, workers, cached)
        hidden = queue + compute
        sent = exposed_ms(demand, table, cached_here, table.links(row), hidden) if len(workers) else compute
        total = own_ms + queue + compute + sent
        fits = (support.prefill == support.decode[row]) & (workers.capacity >= demand.prompt_tokens)
        fits &= total < EXCLUDED
        for prefill in [int(one) for one in np.argsort(total, kind="stable") if fits[one]][:PREFILLS]:
            yield Price(
                **shared,
                prefill=workers.addresses[prefill],
                queue_ms=float(queue[prefill]),
                compute_ms=float(compute[prefill]),
                transfer_ms=float(sent[prefill]),
                damage_ms=0.0,
                total_ms=float(total[prefill]),
                cached_tokens=round(cached.get(prefill, 0.0)),
            )
    if local_prefill != "never":
        compute_here = float(_compute_ms(demand, table.decode, decode_cached)[row])
        requests = float(table.decode.requests[row])
        damage = ITL_WEIGHT * demand.damage * requests * compute_here
        yield Price(
            **shared,
            prefill="",
            queue_ms=0.0,
            compute_ms=compute_here,
            transfer_ms=0.0,
            damage_ms=damage,
            total_ms=own_ms + LOCAL_MARGIN * compute_here + damage,
            cached_tokens=round(cached_here),
        )


def _compute_ms(demand: Demand, workers: WorkerColumns, cached: Cached) -> Floats:
    """The time to compute what is not cached, on each worker."""
    costs = np.dot(compute_weights(demand), workers.terms[COMPUTE])
    save(costs, demand, workers, cached)
    return costs
