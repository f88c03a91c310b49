"""Where a request runs: a pure function of the board. No I/O, no clock, no gRPC.

The policy `cost` prices every worker in milliseconds (`costs.py`) and takes the cheapest; the others are there to
compare it with. Costs that are nearly equal count as equal, and equals are told apart by the prompt's beginning:
requests that begin alike meet in one worker's cache, and several gateways that see the same old reports do not all
choose the same worker.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..proto.errors import InvalidRequest, Unavailable
from .board import NOBODY, Board, Floats, Limit, Offer, Term
from .costs import (
    LOCAL_MARGIN,
    Cached,
    Demand,
    always_hidden,
    cached_tokens,
    column,
    exposed_ms,
    local_ms,
    own_ms,
    remote_ms,
    wait_ms,
)
from .gateway_config import LocalPrefill, Policy
from .policies import SIMPLE
from .ties import preferred

CANDIDATES = 8  # prefill workers that a decode worker is told of
MANY = 64  # rows past which a vector is faster than a list
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


class Allowed(NamedTuple):
    """Which workers may take a request: infinity where one may not, None where all may."""

    kinds: Offer
    decode: Floats | None
    prefill: Floats | None


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
    allowed = allowed_workers(demand, board, avoid=avoid, local_prefill=local_prefill)
    if policy != "cost":
        return _simple(demand, board, allowed, policy, local_prefill)
    prefill, decode = board.prefill, board.decode
    cached, held = cached_tokens(prefill, demand), cached_tokens(decode, demand)
    own, wait = own_ms(demand, decode, board.output_tokens), wait_ms(board, demand)
    if wait is not None:
        own += wait
    if allowed.decode is not None:
        own += allowed.decode
    alone = local_ms(demand, decode, held) if local_prefill != "never" else None
    remote, least_ms = None, NOBODY
    if local_prefill != "always" and prefill.row:
        remote = remote_ms(demand, prefill, cached)
        if allowed.prefill is not None:
            remote += allowed.prefill
        least_ms = remote.item(remote.argmin())
    hidden = always_hidden(demand, board, least_ms)
    if least_ms < NOBODY:
        paired: float | Floats = least_ms
        if not hidden:
            there = column(held, len(decode.addresses))
            paired = least_ms + exposed_ms(demand, board, there, decode.link, least_ms)
        total = own + (paired if alone is None else np.minimum(paired, alone))
    else:
        total = own if alone is None else own + alone
    near_ms = max(NEAR_MS, NEAR * own.item(own.argmin()))
    row = _least(total, decode.seeds, demand.affinity, near_ms)
    wait_here = 0.0 if wait is None else wait.item(row)
    alone_ms = np.inf if alone is None else alone.item(row)
    choice = _Choice(board, allowed.kinds, row, demand.affinity, cached, held.get(row, 0.0))
    if remote is not None:
        if not hidden:
            remote = remote + exposed_ms(demand, board, choice.held_tokens, board.links(row), remote)
        order = choice.partners(remote)
        if order and (prompt_ms := remote.item(order[0])) <= alone_ms:
            return choice.made(order, wait_here + prompt_ms, prompt_ms)
    return choice.made([], wait_here + alone_ms / LOCAL_MARGIN, 0.0)


def allowed_workers(
    demand: Demand, board: Board, *, avoid: Iterable[str] = (), local_prefill: LocalPrefill = "never"
) -> Allowed:
    """Who may take the request; raises what `route` raises."""
    kinds = board.offer(demand.codec)
    avoided = [board.decode.row[address] for address in avoid if address in board.decode.row]
    if demand.tokens <= kinds.fits and not avoided and (local_prefill != "never" or len(board.prefill)):
        return Allowed(kinds, None, None)
    may_prefill = (kinds.prefill >= 0) & (board.prefill.capacity >= demand.prompt_tokens)
    may_decode = (kinds.decode >= 0) & (board.decode.capacity >= demand.tokens)
    if local_prefill == "never":
        may_decode &= np.isin(kinds.decode, kinds.prefill[may_prefill])
    if not may_decode.any():
        raise _refusal(demand, board, local_prefill)
    may_decode[avoided] = False
    if not may_decode.any():
        raise Unavailable("every decode worker that could hold the request failed")
    return Allowed(kinds, np.where(may_decode, 0.0, np.inf), np.where(may_prefill, 0.0, np.inf))


def _refusal(demand: Demand, board: Board, local_prefill: LocalPrefill) -> Exception:
    prompt, total = token_limit(board, demand.codec, local_prefill)
    if not total:
        return Unavailable(f"no prefill and decode worker that share codec {demand.codec} are ready")
    return InvalidRequest(
        f"prompt of {demand.prompt_tokens} and output of {demand.max_tokens} tokens; "
        f"allowed: at most {prompt} and together {total}"
    )


class _Choice(NamedTuple):
    """A decode worker is chosen; its partners are not yet."""

    board: Board
    kinds: Offer
    row: int
    affinity: int
    cached: Cached
    held_tokens: float

    def partners(self, costs: Floats, near_ms: float | None = None) -> list[int]:
        """Rows of the prefill workers that may serve the chosen decode worker, the cheapest first.

        The first of nearly equal ones is the one that the affinity prefers.
        """
        kinds = self.kinds
        if not kinds.fits:
            costs = np.where(kinds.prefill == kinds.decode[self.row], costs, np.inf)
        if not len(costs):
            return []
        first = _least(costs, self.board.prefill.seeds, self.affinity, near_ms)
        if len(costs) > MANY:
            cheap = np.argpartition(costs, CANDIDATES)[: CANDIDATES + 1]
            rows = cheap[costs[cheap].argsort(kind="stable")].tolist()
        else:
            rows = costs.argsort(kind="stable")[: CANDIDATES + 1].tolist()
        if first != rows[0]:
            rows = [first, *[row for row in rows if row != first]]
        return [row for row in rows[:CANDIDATES] if costs.item(row) < NOBODY]

    def made(self, order: list[int], ttft_ms: float, prefill_ms: float) -> Placement:
        """The placement with prefill candidates in this order."""
        kinds, addresses = self.kinds, self.board.prefill.addresses
        page_tokens, codec_hash = kinds.kinds[kinds.decode[self.row]]
        return Placement(
            decode=self.board.decode.addresses[self.row],
            prefill=tuple([addresses[row] for row in order]),
            page_tokens=page_tokens,
            codec_hash=codec_hash,
            ttft_ms=ttft_ms,
            prefill_ms=prefill_ms,
            cached_tokens=self.cached.get(order[0], 0.0) if order else 0.0,
            held_tokens=self.held_tokens,
        )


def _simple(demand: Demand, board: Board, allowed: Allowed, policy: Policy, local_prefill: LocalPrefill) -> Placement:
    """A placement by scores that know nothing of time."""
    scores, affinity = SIMPLE[policy], demand.affinity
    cached, held = cached_tokens(board.prefill, demand), cached_tokens(board.decode, demand)
    on_decode = scores(demand, board.decode, held) + board.decode.terms[Term.PENALTY]
    if allowed.decode is not None:
        on_decode = on_decode + allowed.decode
    row = _least(on_decode, board.decode.seeds, affinity, near_ms=0.0)
    choice = _Choice(board, allowed.kinds, row, affinity, cached, held.get(row, 0.0))
    order: list[int] = []
    if local_prefill != "always":
        on_prefill = scores(demand, board.prefill, cached) + board.prefill.terms[Term.PENALTY]
        if allowed.prefill is not None:
            on_prefill = on_prefill + allowed.prefill
        order = choice.partners(on_prefill, 0.0)
    return choice.made(order, 0.0, 0.0)


def _least(costs: Floats, seeds: Sequence[int], affinity: int, near_ms: float | None = None) -> int:
    """The row of the least cost; of nearly equal ones the one that the affinity prefers."""
    least = costs.item(costs.argmin())
    bound = least + (max(NEAR_MS, NEAR * least) if near_ms is None else near_ms)
    if len(costs) > MANY:
        near = (costs <= bound).nonzero()[0].tolist()
    else:
        near = [row for row, cost in enumerate(costs.tolist()) if cost <= bound]
    return near[0] if len(near) == 1 else preferred(near, seeds, affinity)
