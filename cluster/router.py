"""Where a request runs: a pure function of the board. No I/O, no clock, no gRPC.

The policy `cost` prices every worker in milliseconds (`costs.py`) and takes the cheapest; the others are there to
compare it with. Costs that are nearly equal count as equal, and equals are told apart by the prompt's beginning:
requests that begin alike meet in one worker's cache, and several gateways that see the same old reports do not all
choose the same worker.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..proto.errors import InvalidRequest, Unavailable
from .board import NOBODY, Board, Floats, Limit, Offer, Term
from .costs import (
    ITL_WEIGHT,
    LOCAL_MARGIN,
    Demand,
    Weights,
    always_hidden,
    cached_tokens,
    compute_weights,
    damage_weights,
    exposed_ms,
    queue_weights,
    saved_ms,
    step_weights,
    ties,
    wait_ms,
)
from .gateway_config import LocalPrefill, Policy
from .policies import SIMPLE

CANDIDATES = 8  # prefill workers that a decode worker is told of
NEAR_MS, NEAR = 1.0, 0.05  # costs that differ by less than this, and by this share of the least, are equal


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
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
    compute = compute_weights(demand)
    cached, held = cached_tokens(board.prefill, demand), cached_tokens(board.decode, demand)
    remote = _sum(queue_weights(demand), compute) @ board.prefill.terms
    if cached is not None:
        remote -= saved_ms(board.prefill, demand, cached)
    if allowed.prefill is not None:
        remote += allowed.prefill
    own = np.dot(step_weights(demand, board.output_tokens), board.decode.terms)
    wait = wait_ms(board, demand)
    if wait is not None:
        own += wait
    if allowed.decode is not None:
        own += allowed.decode
    alone = _alone(demand, board, compute, held) if local_prefill != "never" else None
    best = int(remote.argmin()) if len(remote) and local_prefill != "always" else -1
    total = own
    if best >= 0 and remote[best] < NOBODY:
        hidden_ms = remote[best]
        sent = 0.0
        if not always_hidden(demand, board, hidden_ms):
            sent = exposed_ms(demand, board, 0.0 if held is None else held, board.decode.link, hidden_ms)
        total = own + (remote[best] + sent if alone is None else np.minimum(remote[best] + sent, alone))
    elif alone is not None:
        total = own + alone
    chosen = _least(total, board.decode.seeds, demand.affinity, near_ms=max(NEAR_MS, NEAR * float(own.min())))
    return _Choice(demand, board, allowed, chosen, cached, held).placement(
        remote if best >= 0 else None,
        wait_ms=0.0 if wait is None else float(wait[chosen]),
        alone_ms=np.inf if alone is None else float(alone[chosen]),
    )


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


def _alone(demand: Demand, board: Board, compute: Weights, held: Floats | None) -> Floats:
    """What it costs that a decode worker computes the prompt itself."""
    pool = board.decode
    weights = [LOCAL_MARGIN * own + others for own, others in zip(compute, damage_weights(demand), strict=True)]
    alone = np.dot(weights, pool.terms)
    if held is not None:
        alone -= (LOCAL_MARGIN + ITL_WEIGHT * demand.damage * pool.requests) * saved_ms(pool, demand, held)
    return alone


@dataclass(frozen=True, slots=True)
class _Choice:
    """A decode worker is chosen; its partners are not yet."""

    demand: Demand
    board: Board
    allowed: Allowed
    row: int
    cached: Floats | None
    held: Floats | None

    def placement(self, remote: Floats | None, *, wait_ms: float, alone_ms: float) -> Placement:
        """With the prefill candidates, the cheapest first, or alone; `remote` is what each prefill worker costs."""
        demand, board = self.demand, self.board
        if remote is not None:
            held = 0.0 if self.held is None else float(self.held[self.row])
            if not always_hidden(demand, board, float(remote.min())):
                remote = remote + exposed_ms(demand, board, held, board.links(self.row), remote)
            order = self.partners(remote)
            if order and (remote[order[0]] <= alone_ms):
                return self.made(order, wait_ms, float(remote[order[0]]))
        return self.made([], wait_ms, alone_ms / LOCAL_MARGIN)

    def partners(self, costs: Floats, near_ms: float | None = None) -> list[int]:
        """Rows of the prefill workers that may serve the chosen decode worker, the cheapest first."""
        kinds = self.allowed.kinds
        if not kinds.fits:
            costs = np.where(kinds.prefill == kinds.decode[self.row], costs, np.inf)
        return _order(costs, self.board.prefill.seeds, self.demand.affinity, near_ms)

    def made(self, order: list[int], wait_ms: float, prompt_ms: float) -> Placement:
        """The placement with prefill candidates in this order."""
        kinds, addresses = self.allowed.kinds, self.board.prefill.addresses
        page_tokens, codec_hash = kinds.kinds[kinds.decode[self.row]]
        return Placement(
            decode=self.board.decode.addresses[self.row],
            prefill=tuple([addresses[row] for row in order]),
            page_tokens=page_tokens,
            codec_hash=codec_hash,
            ttft_ms=wait_ms + prompt_ms,
            prefill_ms=prompt_ms if order else 0.0,
            cached_tokens=float(self.cached[order[0]]) if order and self.cached is not None else 0.0,
            held_tokens=float(self.held[self.row]) if self.held is not None else 0.0,
        )


def _simple(demand: Demand, board: Board, allowed: Allowed, policy: Policy, local_prefill: LocalPrefill) -> Placement:
    """A placement by scores that know nothing of time."""
    scores = SIMPLE[policy]
    cached, held = cached_tokens(board.prefill, demand), cached_tokens(board.decode, demand)
    on_decode = scores(demand, board.decode, held) + board.decode.terms[Term.PENALTY]
    if allowed.decode is not None:
        on_decode = on_decode + allowed.decode
    choice = _Choice(
        demand, board, allowed, _least(on_decode, board.decode.seeds, demand.affinity, near_ms=0.0), cached, held
    )
    order: list[int] = []
    if local_prefill != "always":
        on_prefill = scores(demand, board.prefill, cached) + board.prefill.terms[Term.PENALTY]
        if allowed.prefill is not None:
            on_prefill = on_prefill + allowed.prefill
        order = choice.partners(on_prefill, 0.0)
    return choice.made(order, 0.0, 0.0)


def _least(costs: Floats, seeds: NDArray[np.uint64], affinity: int, near_ms: float | None = None) -> int:
    """The row of the least cost; of nearly equal ones the one that the affinity prefers."""
    least = costs.min()
    equal = (costs <= least + (max(NEAR_MS, NEAR * least) if near_ms is None else near_ms)).nonzero()[0]
    return int(equal[0] if len(equal) == 1 else equal[ties(seeds[equal], affinity).argmin()])


def _order(costs: Floats, seeds: NDArray[np.uint64], affinity: int, near_ms: float | None) -> list[int]:
    """Rows of finite cost, the cheapest first; the first of nearly equal ones is the one that the affinity prefers."""
    if not len(costs):
        return []
    first = _least(costs, seeds, affinity, near_ms)
    if len(costs) > CANDIDATES:
        rest = np.argpartition(costs, CANDIDATES)[: CANDIDATES + 1]
        rest = rest[costs[rest].argsort(kind="stable")]
    else:
        rest = costs.argsort(kind="stable")
    finite = costs < NOBODY
    return [row for row in (first, *(row for row in rest.tolist() if row != first)) if finite[row]][:CANDIDATES]


def _sum(one: Weights, other: Weights) -> Floats:
    return np.array([a + b for a, b in zip(one, other, strict=True)])
