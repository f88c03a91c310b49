"""Where a request runs: a pure function of the board. No I/O, no clock, no gRPC.

The policy `cost` prices every worker in milliseconds (`costs.py`) and takes the cheapest; the others are there to
compare it with. Costs that are nearly equal count as equal, and equals are told apart by the prompt's beginning:
requests that begin alike meet in one worker's cache, and several gateways that see the same old reports do not all
choose the same worker.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...proto.errors import InvalidRequest, Unavailable
from ..gateway_config import LocalPrefill, Policy
from .cost_vectors import Costs, cheapest, least, plain, plus_lesser, up_to
from .costs import (
    ITL_WEIGHT,
    LOCAL_MARGIN,
    Cached,
    Demand,
    all_weights,
    always_hidden,
    cached_tokens,
    column,
    exposed_ms,
    local_ms,
    own_ms,
    remote_ms,
    wait_ms,
)
from .routing_table import Board, Limit, Offer
from .simple_policies import SIMPLE
from .tie_breaking import preferred
from .worker_columns import NOBODY, Floats, Term

CANDIDATES = 8  # prefill workers that a decode worker is told of
NEAR_MS, NEAR = 1.0, 0.05  # costs that differ by less than this, and by this share of the least, are equal


class Placement(NamedTuple):
    """One decode worker, and prefill workers in the order to try them; with none it computes the prompt itself."""

    decode: str
    prefill: tuple[str, ...]
    page_tokens: int
    codec_hash: str
    ttft_ms: float = 0.0  # expected
    prefill_ms: float = 0.0  # of that, on the first prefill worker
    cached_tokens: float = 0.0  # believed to be cached on the first prefill worker
    held_tokens: float = 0.0  # and on the decode worker


# The kinds of workers; which decode workers and which prefill workers may take a request: infinity where one may not,
# None where all may.
Allowed = tuple[Offer, Floats | None, Floats | None]


def offered_codecs(board: Board, local_prefill: LocalPrefill = "never") -> tuple[str, ...]:
    """The codecs that some decode worker can serve: with a prefill worker of its kind, or on its own; sorted."""
    return tuple(name for name in board.codecs if token_limit(board, name, local_prefill)[0])


def token_limit(board: Board, codec: str | None = None, local_prefill: LocalPrefill = "never") -> Limit:
    """The longest prompt, and prompt and output together, that can be served; (0, 0) where nothing can.

    Over all codecs where `codec` is None.
    """
    if codec is not None:
        offer = board.offer(codec)
        return offer.paired if local_prefill == "never" else offer.alone
    limits = [token_limit(board, name, local_prefill) for name in board.codecs]
    return max((prompt for prompt, _ in limits), default=0), max((total for _, total in limits), default=0)


def route(
    demand: Demand,
    board: Board,
    *,
    avoid: Iterable[str] = (),
    policy: Policy = "cost",
    local_prefill: LocalPrefill = "never",
) -> Placement:
    """Places a request, not on the decode workers in `avoid`.

    Unavailable where nothing that could serve it is there, InvalidRequest where nothing could ever hold it.
    """
    kinds, may_decode, may_prefill = allowed_workers(demand, board, avoid=avoid, local_prefill=local_prefill)
    if policy != "cost":
        return _simple(demand, board, (kinds, may_decode, may_prefill), policy, local_prefill)
    prefill, decode = board.prefill, board.decode
    cached, held = cached_tokens(prefill, demand), cached_tokens(decode, demand)
    weights = all_weights(demand, board.output_tokens)
    own, wait = own_ms(weights, decode), wait_ms(board, demand)
    if wait is not None:
        own = plain(own + wait)
    if may_decode is not None:
        own = plain(own + may_decode)
    alone = local_ms(weights, demand, decode, held) if local_prefill != "never" else None
    remote: Costs = []
    least_ms = NOBODY
    if local_prefill != "always" and prefill.row:
        remote = remote_ms(weights, demand, prefill, cached)
        if may_prefill is not None:
            remote = plain(remote + may_prefill)
        least_ms = least(remote)
    paired: Costs | float = least_ms
    hidden = always_hidden(demand, board, least_ms)
    if not hidden:
        paired = plain(least_ms + exposed_ms(demand, board, column(held, len(own)), decode.link, least_ms))
    total = plus_lesser(own, paired, NOBODY if alone is None else alone)
    row = _least(total, decode.seeds, demand.affinity, max(NEAR_MS, NEAR * least(own)))
    wait_here = 0.0 if wait is None else wait.item(row)
    alone_ms = NOBODY if alone is None else alone[row]
    if least_ms <= alone_ms:
        if not hidden:
            before = np.array(remote)
            remote = plain(before + exposed_ms(demand, board, held.get(row, 0.0), board.links(row), before))
        order = _partners(remote, board, kinds, row, demand.affinity)
        if order and (prompt_ms := remote[order[0]]) <= alone_ms:
            first = cached.get(order[0], 0.0)
            return _placement(board, kinds, row, order, wait_here + prompt_ms, prompt_ms, first, held)
    compute_ms = alone_ms / (LOCAL_MARGIN + ITL_WEIGHT * demand.damage * decode.requests.item(row))
    return _placement(board, kinds, row, [], wait_here + compute_ms, 0.0, 0.0, held)


def allowed_workers(
    demand: Demand, board: Board, *, avoid: Iterable[str] = (), local_prefill: LocalPrefill = "never"
) -> Allowed:
    """Who may take the request; raises what `route` raises."""
    kinds = board.offer(demand.codec)
    avoided = [board.decode.row[address] for address in avoid if address in board.decode.row] if avoid else []
    if demand.tokens <= kinds.fits and not avoided and (local_prefill != "never" or len(board.prefill)):
        return kinds, None, None
    may_prefill = (kinds.prefill >= 0) & (board.prefill.capacity >= demand.prompt_tokens)
    may_decode = (kinds.decode >= 0) & (board.decode.capacity >= demand.tokens)
    if local_prefill == "never":
        may_decode &= np.isin(kinds.decode, kinds.prefill[may_prefill])
    if not may_decode.any():
        raise _refusal(demand, board, local_prefill)
    may_decode[avoided] = False
    if not may_decode.any():
        raise Unavailable("every decode worker that could hold the request failed")
    return kinds, np.where(may_decode, 0.0, np.inf), np.where(may_prefill, 0.0, np.inf)


def _refusal(demand: Demand, board: Board, local_prefill: LocalPrefill) -> Exception:
    prompt, total = token_limit(board, demand.codec, local_prefill)
    if not total:
        return Unavailable(f"no prefill and decode worker that share codec {demand.codec} are ready")
    return InvalidRequest(
        f"prompt of {demand.prompt_tokens} and output of {demand.max_tokens} tokens; "
        f"allowed: at most {prompt} and together {total}"
    )


def _partners(
    costs: Costs, board: Board, kinds: Offer, row: int, affinity: int, near_ms: float | None = None
) -> list[int]:
    """Rows of the prefill workers that may serve the decode worker of a row, the cheapest first.

    The first of nearly equal ones is the one that the affinity prefers.
    """
    if not kinds.fits:
        costs = plain(np.where(kinds.prefill == kinds.decode[row], costs, np.inf))
    if not len(costs):
        return []
    rows = cheapest(costs, CANDIDATES + 1)
    bound = _nearly(costs[rows[0]], near_ms)
    if len(rows) > 1 and costs[rows[1]] <= bound:
        first = preferred(up_to(costs, bound), board.prefill.seeds, affinity)
        rows = [first, *[row for row in rows if row != first]]
    return [row for row in rows[:CANDIDATES] if costs[row] < NOBODY]


def _placement(
    board: Board,
    kinds: Offer,
    row: int,
    order: list[int],
    ttft_ms: float,
    prefill_ms: float,
    cached: float,
    held: Cached,
) -> Placement:
    """On the decode worker of a row, with prefill candidates in this order."""
    addresses = board.prefill.addresses
    page_tokens, codec_hash = kinds.kinds[kinds.decode.item(row)]
    partners = tuple([addresses[partner] for partner in order])
    decode, there = board.decode.addresses[row], held.get(row, 0.0)
    return Placement(decode, partners, page_tokens, codec_hash, ttft_ms, prefill_ms, cached, there)


def _simple(demand: Demand, board: Board, allowed: Allowed, policy: Policy, local_prefill: LocalPrefill) -> Placement:
    """A placement by scores that know nothing of time."""
    kinds, may_decode, may_prefill = allowed
    scores, affinity = SIMPLE[policy], demand.affinity
    cached, held = cached_tokens(board.prefill, demand), cached_tokens(board.decode, demand)
    on_decode = scores(demand, board.decode, held) + board.decode.terms[Term.PENALTY]
    if may_decode is not None:
        on_decode = on_decode + may_decode
    row = _least(plain(on_decode), board.decode.seeds, affinity, near_ms=0.0)
    order: list[int] = []
    if local_prefill != "always":
        on_prefill = scores(demand, board.prefill, cached) + board.prefill.terms[Term.PENALTY]
        if may_prefill is not None:
            on_prefill = on_prefill + may_prefill
        order = _partners(plain(on_prefill), board, kinds, row, affinity, 0.0)
    first = cached.get(order[0], 0.0) if order else 0.0
    return _placement(board, kinds, row, order, 0.0, 0.0, first, held)


def _least(costs: Costs, seeds: Sequence[int], affinity: int, near_ms: float | None = None) -> int:
    """The row of the least cost; of nearly equal ones the one that the affinity prefers."""
    near = up_to(costs, _nearly(least(costs), near_ms))
    return near[0] if len(near) == 1 else preferred(near, seeds, affinity)


def _nearly(least_ms: float, near_ms: float | None) -> float:
    """Up to here costs are nearly equal to the least."""
    return least_ms + (max(NEAR_MS, NEAR * least_ms) if near_ms is None else near_ms)
