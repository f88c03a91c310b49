"""Which requests hold pages and which of them are stepped. Pure: capacity comes in as arguments."""

from dataclasses import dataclass
from enum import Enum
from typing import NewType

from ..proto.errors import Exhausted, InvalidRequest

SequenceId = NewType("SequenceId", int)

AGEING_S = 30.0  # of waiting that make up for one class of priority


class State(Enum):
    """Where a request stands in the decode worker."""

    WAITING = "waiting"  # for pages
    RECEIVING = "receiving"  # holds its pages; the prompt's KV is on its way
    RUNNING = "running"  # in the batch
    DONE = "done"  # holds nothing any more


LEGAL = {
    State.WAITING: {State.RECEIVING, State.DONE},
    State.RECEIVING: {State.RUNNING, State.DONE},
    State.RUNNING: {State.DONE},
    State.DONE: set(),
}


@dataclass
class _Entry:
    prompt_tokens: int
    order: float  # who goes first: the lower
    state: State = State.WAITING


class DecodeScheduler:
    """First come, first served, but that a class of priority is worth `AGEING_S` of waiting.

    So nobody overtakes a request that has waited that much longer, and who goes first never changes.
    """

    def __init__(self, *, total_pages: int, page_tokens: int, max_batch: int, max_waiting: int) -> None:
        self.total_pages, self.page_tokens = total_pages, page_tokens
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._entries: dict[SequenceId, _Entry] = {}

    def check_fits(self, tokens: int, waiting: int) -> None:
        """InvalidRequest for what can never fit, Exhausted where `waiting` requests are too many already."""
        room = self.total_pages * self.page_tokens
        if tokens > room:
            raise InvalidRequest(
                f"prompt and new tokens come to {tokens}; this worker holds at most {room}: ask for fewer max_tokens"
            )
        if waiting >= self._max_waiting:
            raise Exhausted(f"{waiting} requests wait here already; try again later")

    def add(self, sequence: SequenceId, prompt_tokens: int, rank: int, arrived_s: float) -> None:
        """Queues a request of that rank of priority."""
        self._entries[sequence] = _Entry(prompt_tokens, arrived_s + rank * AGEING_S)

    def queue(self) -> list[SequenceId]:
        """The requests that wait for pages, the next one first. One that does not fit blocks those behind it."""
        return self._in_order(State.WAITING)

    def may_admit(self) -> bool:
        """Whether one more request may hold pages, if there are enough."""
        return len(self._entries) - self.count(State.WAITING) < self._max_batch

    def admitted(self, sequence: SequenceId) -> None:
        """The request holds its pages now."""
        self._move(sequence, State.RECEIVING)

    def run(self, sequence: SequenceId) -> None:
        """The request has its KV, or all of it that comes from others: it is in the batch from the next step on."""
        self._move(sequence, State.RUNNING)

    def batch(self) -> list[SequenceId]:
        """The requests of the next step, the first in order first."""
        return self._in_order(State.RUNNING)

    def remove(self, sequence: SequenceId) -> None:
        """Forgets a request in whatever state."""
        if sequence in self._entries:
            self._move(sequence, State.DONE)
            del self._entries[sequence]

    def count(self, state: State) -> int:
        return sum(entry.state is state for entry in list(self._entries.values()))

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of requests that wait for pages."""
        entries = list(self._entries.values())
        return sum(entry.prompt_tokens for entry in entries if entry.state is State.WAITING)

    def _in_order(self, state: State) -> list[SequenceId]:
        found = [sequence for sequence, entry in self._entries.items() if entry.state is state]
        return sorted(found, key=lambda sequence: (self._entries[sequence].order, sequence))

    def _move(self, sequence: SequenceId, to: State) -> None:
        entry = self._entries[sequence]
        assert to in LEGAL[entry.state], f"{entry.state} to {to}"
        entry.state = to
