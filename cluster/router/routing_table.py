"""All workers that take work, and what the gateway learnt of requests: all that the router reads. Pure."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...proto.worker_pb2 import MemoryUse
from .prefixes import STEP_BYTES, STEPS_IN_ALL
from .worker_columns import RECENT, Floats, Pool, WorkerLoad

PRIOR_OUTPUT = 128.0  # tokens of an answer
PRIOR_BYTES = 10_000.0  # of KV on the wire, per token

Limit = tuple[int, int]  # the longest prompt, and prompt and output together, in tokens; (0, 0): nothing


class Offer(NamedTuple):
    """What one codec means among the workers here: those of the same kind may be paired."""

    kinds: tuple[tuple[int, str], ...]  # (page tokens, parameter hash)
    prefill: NDArray[np.int64]  # kind of each row, -1 for none
    decode: NDArray[np.int64]
    fits: int  # a request of so many tokens fits on every worker, and all may be paired; 0 where not all may
    paired: Limit  # where a prefill worker computes the prompt
    alone: Limit  # where the decode worker does


class Board:
    """Both pools, and what the gateway learnt of requests on its own."""

    def __init__(self) -> None:
        self.prefill = Pool()
        self.decode = Pool(self.prefill)
        self.output_tokens = PRIOR_OUTPUT  # of an answer, on average
        self._wire_bytes: dict[str, float] = {}  # by codec: KV on the wire for each token
        self._offers: dict[str, Offer] = {}
        self._codecs: tuple[str, ...] | None = None
        self._members = (0, 0)
        self._links: dict[tuple[str, int], tuple[Mapping[str, float], Floats]] = {}

    @property
    def measured(self) -> bool:
        """Whether times go by what workers measured, and not by what one might think."""
        prompts, steps = self.decode.measured
        return steps and (prompts or self.prefill.measured[0])

    def wire_bytes(self, codec: str) -> float:
        """Bytes of KV on the wire for each token."""
        return self._wire_bytes.get(codec, PRIOR_BYTES)

    def saw_transfer(self, codec: str, tokens: int, wire_bytes: int) -> None:
        """A prompt was moved."""
        if tokens > 0:
            before = self._wire_bytes.get(codec, wire_bytes / tokens)
            self._wire_bytes[codec] = before + RECENT * (wire_bytes / tokens - before)

    def saw_answer(self, tokens: int) -> None:
        """An answer came to its end."""
        self.output_tokens += RECENT * (tokens - self.output_tokens)

    def offer(self, codec: str) -> Offer:
        """The kinds of workers for one codec."""
        self._refresh()
        offer = self._offers.get(codec)
        if offer is None:
            kinds: dict[tuple[int, str], int] = {}
            rows = [_kinds(pool, codec, kinds) for pool in (self.decode, self.prefill)]
            fits = 0
            if (
                len(kinds) == 1
                and len(self.decode)
                and all(
                    int((found >= 0).sum()) == len(pool)
                    for found, pool in zip(rows, (self.decode, self.prefill), strict=True)
                )
            ):
                fits = min(load.capacity_tokens for pool in (self.decode, self.prefill) for load in pool.loads.values())
            limits = self._limits(rows[1], rows[0])
            offer = self._offers[codec] = Offer(tuple(kinds), rows[1], rows[0], fits, *limits)
        return offer

    def _limits(self, prefill: NDArray[np.int64], decode: NDArray[np.int64]) -> tuple[Limit, Limit]:
        paired, alone = (0, 0), (0, 0)
        for row in np.flatnonzero(decode >= 0):
            held = int(self.decode.capacity[row])
            partners = self.prefill.capacity[prefill == decode[row]]
            longest = min(int(partners.max()), held - 1) if len(partners) else 0
            alone = max(alone[0], held - 1), max(alone[1], held)
            if longest > 0:
                paired = max(paired[0], longest), max(paired[1], held)
        return paired, alone

    def prefix_memory(self) -> MemoryUse:
        """What is remembered of prefixes, of both pools."""
        steps = self.prefill.prefixes.steps + self.decode.prefixes.steps
        return MemoryUse(name="prefixes", used_bytes=steps * STEP_BYTES, budget_bytes=2 * STEPS_IN_ALL * STEP_BYTES)

    def links(self, decode: int) -> Floats:
        """Bytes per ms from each prefill worker to the decode worker of a row, [prefill rows]."""
        address, measured = self.decode.addresses[decode], self.decode.loads[self.decode.addresses[decode]].links
        key = (address, self.prefill.members)
        known = self._links.get(key)
        if known is None or known[0] is not measured:
            rates = np.full(len(self.prefill.addresses), self.decode.link[decode])
            for peer, rate in measured.items():
                if peer in self.prefill.row:
                    rates[self.prefill.row[peer]] = rate
            self._links[key] = known = (measured, rates)
        return known[1]

    @property
    def codecs(self) -> tuple[str, ...]:
        """All codecs of the decode workers, sorted."""
        self._refresh()
        if self._codecs is None:
            self._codecs = tuple(sorted({name for load in self.decode.loads.values() for name in load.codecs}))
        return self._codecs

    def _refresh(self) -> None:
        """Forgets what was made for another set of workers."""
        members = (self.prefill.members, self.decode.members)
        if self._members != members:
            self._offers.clear()
            self._links.clear()
            self._codecs, self._members = None, members


def _kinds(pool: Pool, codec: str, kinds: dict[tuple[int, str], int]) -> NDArray[np.int64]:
    rows = np.full(len(pool.addresses), -1)
    for address, load in pool.loads.items():
        params = load.codecs.get(codec)
        if params is not None:
            rows[pool.row[address]] = kinds.setdefault((load.page_tokens, params), len(kinds))
    return rows


def board_of(prefill: Iterable[WorkerLoad], decode: Iterable[WorkerLoad]) -> Board:
    """A board of these workers."""
    board = Board()
    for pool, loads in ((board.prefill, prefill), (board.decode, decode)):
        for load in loads:
            pool.put(load)
    return board
