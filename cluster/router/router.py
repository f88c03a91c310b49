"""Where a request runs: a pure function of the routing table. No I/O, no clock, no gRPC.

The policy `cost` prices every worker in milliseconds (`costs.py`) and takes the cheapest; the others are there to
compare it with. Costs that are nearly equal count as equal, and ties are broken by the prompt's beginning: requests
that begin alike meet in one worker's cache, and several gateways that see the same old reports do not all
choose the same worker.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...proto.errors import InvalidRequest, Unavailable
from .cost_vectors import Costs, add_minimum, as_costs, cheapest_rows, minimum, rows_up_to
from .costs import (
    ITL_WEIGHT,
    LOCAL_MARGIN,
    Cached,
    Demand,
    all_weights,
    always_hidden,
    cached_tokens,
    dense,
    exposed_ms,
    local_ms,
    own_ms,
    remote_ms,
    wait_ms,
)
from .policies import LocalPrefill, Policy
from .routing_table import CodecSupport, Limit, RoutingTable
from .simple_policies import SIMPLE
from .tie_breaking import break_tie
from .worker_columns import EXCLUDED, Floats, Term

CANDIDATES = 8  # prefill workers in a placement
NEAR_MS, NEAR = 1.0, 0.05  # costs that differ by less than this, and by this share of the least, are equal


class Placement(NamedTuple):
    """One decode worker, and prefill workers in the order to try them; with none it computes the prompt itself."""

    decode: str
    prefill: tuple[str, ...]
    page_tokens: int
    codec_hash: str
    ttft_ms: float = 0.0  # expected
    prefill_ms: float = 0.0  # of that, on the first prefill worker
    prefill_cached_tokens: float = 0.0  # predicted to be cached on the first prefill worker
    decode_cached_tokens: float = 0.0  # and on the decode worker


# Who supports the codec; the decode workers and the prefill workers that may take a request: infinity where one may
# not, None where all may.
Allowed = tuple[CodecSupport, Floats | None, Floats | None]


def servable_codecs(table: RoutingTable, local_prefill: LocalPrefill = "never") -> tuple[str, ...]:
    """The codecs that some decode worker can serve: with a prefill worker of the same layout, or on its own; sorted."""
    return tuple(name for name in table.codecs if token_limit(table, name, local_prefill)[0])


def token_limit(table: RoutingTable, codec: str | None = None, local_prefill: LocalPrefill = "never") -> Limit:
    """The longest prompt, and prompt and output together, that can be served; (0, 0) where nothing can.

    Over all codecs where `codec` is None.
    """
    if codec is not None:
        support = table.codec_support(codec)
        return support.paired_limit if local_prefill == "never" else support.local_limit
    limits = [token_limit(table, name, local_prefill) for name in table.codecs]
    return max((prompt for prompt, _ in limits), default=0), max((total for _, total in limits), default=0)


def route(
    demand: Demand,
    table: RoutingTable,
    *,
    avoid: Iterable[str] = (),
    policy: Policy = "cost",
    local_prefill: LocalPrefill = "never",
) -> Placement:
    """Places a request, not on the decode workers in `avoid`.

    Unavailable where nothing that could serve it is there, InvalidRequest where nothing could ever hold it.
    """
    support, may_decode, may_prefill = allowed_workers(demand, table, avoid=avoid, local_prefill=local_prefill)
    if policy != "cost":
        return _simple(demand, table, (support, may_decode, may_prefill), policy, local_prefill)
    prefill, decode = table.prefill, table.decode
    prefill_cached, decode_cached = cached_tokens(prefill, demand), cached_tokens(decode, demand)
    weights = all_weights(demand, table.output_tokens)
    own, wait = own_ms(weights, decode), wait_ms(table, demand)
    if wait is not None:
        own = as_costs(own + wait)
    if may_decode is not None:
        own = as_costs(own + may_decode)
    local = local_ms(weights, demand, decode, decode_cached) if local_prefill != "never" else None
    remote: Costs = []
    least_ms = EXCLUDED
    if local_prefill != "always" and prefill.row_of:
        remote = remote_ms(weights, demand, prefill, prefill_cached)
        if may_prefill is not None:
            remote = as_costs(remote + may_prefill)
        least_ms = minimum(remote)
    paired: Costs | float = least_ms
    hidden = always_hidden(demand, table, least_ms)
    if not hidden:
        paired = as_costs(least_ms + exposed_ms(demand, table, dense(decode_cached, len(own)), decode.link, least_ms))
    total = add_minimum(own, paired, EXCLUDED if local is None else local)
    row = _least(total, decode.seeds, demand.affinity, max(NEAR_MS, NEAR * minimum(own)))
    wait_here = 0.0 if wait is None else wait.item(row)
    local_cost = EXCLUDED if local is None else local[row]
    if least_ms <= local_cost:
        if not hidden:
            before = np.array(remote)
            remote = as_costs(before + exposed_ms(demand, table, decode_cached.get(row, 0.0), table.links(row), before))
        order = _partners(remote, table, support, row, demand.affinity)
        if order and (prompt_ms := remote[order[0]]) <= local_cost:
            first = prefill_cached.get(order[0], 0.0)
            return _placement(table, support, row, order, wait_here + prompt_ms, prompt_ms, first, decode_cached)
    compute_ms = local_cost / (LOCAL_MARGIN + ITL_WEIGHT * demand.damage * decode.requests.item(row))
    return _placement(table, support, row, [], wait_here + compute_ms, 0.0, 0.0, decode_cached)


def allowed_workers(
    demand: Demand, table: RoutingTable, *, avoid: Iterable[str] = (), local_prefill: LocalPrefill = "never"
) -> Allowed:
    """Who may take the request; raises what `route` raises."""
    support = table.codec_support(demand.codec)
    avoided = [table.decode.row_of[address] for address in avoid if address in table.decode.row_of] if avoid else []
    if demand.tokens <= support.fits_all and not avoided and (local_prefill != "never" or len(table.prefill)):
        return support, None, None
    may_prefill = (support.prefill >= 0) & (table.prefill.capacity >= demand.prompt_tokens)
    may_decode = (support.decode >= 0) & (table.decode.capacity >= demand.tokens)
    if local_prefill == "never":
        may_decode &= np.isin(support.decode, support.prefill[may_prefill])
    if not may_decode.any():
        raise _refusal(demand, table, local_prefill)
    may_decode[avoided] = False
    if not may_decode.any():
        raise Unavailable("every decode worker that could hold the request failed")
    return support, np.where(may_decode, 0.0, np.inf), np.where(may_prefill, 0.0, np.inf)


def _refusal(demand: Demand, table: RoutingTable, local_prefill: LocalPrefill) -> Exception:
    prompt, total = token_limit(table, demand.codec, local_prefill)
    if not total:
        return Unavailable(f"no prefill and decode worker that share codec {demand.codec} are ready")
    return InvalidRequest(
        f"prompt of {demand.prompt_tokens} and output of {demand.max_tokens} tokens; "
        f"allowed: at most {prompt} and together {total}"
    )


def _partners(
    costs: Costs, table: RoutingTable, support: CodecSupport, row: int, affinity: int, near_ms: float | None = None
) -> list[int]:
    """Rows of the prefill workers that may serve the decode worker of a row, the cheapest first.

    The first of nearly equal ones is the one that the affinity prefers.
    """
    if not support.fits_all:
        costs = as_costs(np.where(support.prefill == support.decode[row], costs, np.inf))
    if not len(costs):
        return []
    rows = cheapest_rows(costs, CANDIDATES + 1)
    bound = _nearly(costs[rows[0]], near_ms)
    if len(rows) > 1 and costs[rows[1]] <= bound:
        first = break_tie(rows_up_to(costs, bound), table.prefill.seeds, affinity)
        rows = [first, *[row for row in rows if row != first]]
    return [row for row in rows[:CANDIDATES] if costs[row] < EXCLUDED]


def _placement(
    table: RoutingTable,
    support: CodecSupport,
    row: int,
    order: list[int],
    ttft_ms: float,
    prefill_ms: float,
    cached: float,
    decode_cached: Cached,
) -> Placement:
    """A placement on the decode worker of a row, with prefill candidates in this order."""
    addresses = table.prefill.addresses
    page_tokens, codec_hash = support.layouts[support.decode.item(row)]
    partners = tuple([addresses[partner] for partner in order])
    decode, cached_here = table.decode.addresses[row], decode_cached.get(row, 0.0)
    return Placement(decode, partners, page_tokens, codec_hash, ttft_ms, prefill_ms, cached, cached_here)


def _simple(
    demand: Demand, table: RoutingTable, allowed: Allowed, policy: Policy, local_prefill: LocalPrefill
) -> Placement:
    """A placement by a policy without a cost model."""
    support, may_decode, may_prefill = allowed
    scores, affinity = SIMPLE[policy], demand.affinity
    prefill_cached, decode_cached = cached_tokens(table.prefill, demand), cached_tokens(table.decode, demand)
    on_decode = scores(demand, table.decode, decode_cached) + table.decode.terms[Term.PENALTY]
    if may_decode is not None:
        on_decode = on_decode + may_decode
    row = _least(as_costs(on_decode), table.decode.seeds, affinity, near_ms=0.0)
    order: list[int] = []
    if local_prefill != "always":
        on_prefill = scores(demand, table.prefill, prefill_cached) + table.prefill.terms[Term.PENALTY]
        if may_prefill is not None:
            on_prefill = on_prefill + may_prefill
        order = _partners(as_costs(on_prefill), table, support, row, affinity, 0.0)
    first = prefill_cached.get(order[0], 0.0) if order else 0.0
    return _placement(table, support, row, order, 0.0, 0.0, first, decode_cached)


def _least(costs: Costs, seeds: Sequence[int], affinity: int, near_ms: float | None = None) -> int:
    """The row of the least cost; of nearly equal ones the one that the affinity prefers."""
    near = rows_up_to(costs, _nearly(minimum(costs), near_ms))
    return near[0] if len(near) == 1 else break_tie(near, seeds, affinity)


def _nearly(least_ms: float, near_ms: float | None) -> float:
    """The bound up to which costs are nearly equal to the least."""
    return least_ms + (max(NEAR_MS, NEAR * least_ms) if near_ms is None else near_ms)
