"""Which requests hold pages, which of them are stepped, and who makes room. Pure: capacity comes in as arguments."""

from dataclasses import dataclass
from enum import Enum
from typing import NewType

from ...proto.errors import Exhausted, InvalidRequest

SequenceId = NewType("SequenceId", int)

AGEING_S = 30.0  # of waiting that make up for one class of priority


class State(Enum):
    """Where a request stands in the decode worker."""

    WAITING = "waiting"  # for pages
    RECEIVING = "receiving"  # holds its pages; the prompt's KV is on its way
    RUNNING = "running"  # in the batch
    PREEMPTED = "preempted"  # its pages are in host memory, others have theirs
    DONE = "done"  # holds nothing any more


LEGAL = {
    State.WAITING: {State.RECEIVING, State.DONE},
    State.RECEIVING: {State.RUNNING, State.DONE},
    State.RUNNING: {State.PREEMPTED, State.DONE},
    State.PREEMPTED: {State.RUNNING, State.DONE},
    State.DONE: set(),
}


@dataclass
class _Entry:
    prompt_tokens: int
    pages: int  # that it can come to hold
    rank: int
    order: float  # who goes first: the lower
    state: State = State.WAITING


class DecodeScheduler:
    """First come, first served, but that a class of priority is worth `AGEING_S` of waiting.

    So nobody overtakes a request that has waited that much longer, and who goes first never changes: the first in
    order is never preempted, gets whatever pages it needs, and comes to its end; then the next one is the first.

    A request is admitted with pages for its prompt and some headroom. What it may come to hold beyond that is
    promised as far as pool and host memory can hold it together: where the pool is full, enough host memory is free
    for any one request, so that somebody can always make room and nothing waits for ever.
    """

    def __init__(
        self,
        *,
        total_pages: int,
        page_tokens: int,
        max_batch: int,
        max_waiting: int,
        host_pages: int = 0,
        saved_extra_pages: int = 0,
    ) -> None:
        """`host_pages`: of preempted requests that host memory may hold; 0: nobody is preempted.

        `saved_extra_pages`: how many more of these one preempted request takes than it had pages, at most.
        """
        self.total_pages, self.page_tokens = total_pages, page_tokens
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._host_pages, self._saved_extra = host_pages, saved_extra_pages
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

    def add(self, sequence: SequenceId, *, prompt_tokens: int, tokens: int, rank: int, arrived_s: float) -> None:
        """Queues a request that can come to hold `tokens`, its prompt included."""
        pages = -(-tokens // self.page_tokens)
        self._entries[sequence] = _Entry(prompt_tokens, pages, rank, arrived_s + rank * AGEING_S)

    def queue(self) -> list[SequenceId]:
        """The requests that wait for pages, the next one first. One that does not fit blocks those behind it."""
        return self._in_order(State.WAITING, State.PREEMPTED)

    def has_slot(self) -> bool:
        """Whether one more request may hold pages, however many there are."""
        return self.count(State.RECEIVING, State.RUNNING) < self._max_batch

    def is_promised(self, sequence: SequenceId) -> bool:
        """Whether all that the request may come to hold finds room in pool and host memory, beside the others'."""
        entry = self._entries[sequence]
        if entry.state is State.PREEMPTED:
            return True
        pages = [e.pages for e in list(self._entries.values()) if e.state is not State.WAITING] + [entry.pages]
        if sum(pages) <= self.total_pages:
            return True
        saved = [count + self._saved_extra for count in pages]
        return sum(saved) <= self.total_pages + self._host_pages - max(saved)

    def state(self, sequence: SequenceId) -> State:
        return self._entries[sequence].state

    def admitted(self, sequence: SequenceId) -> None:
        """The request holds its pages now: new ones, or those that it had before it was preempted."""
        preempted = self._entries[sequence].state is State.PREEMPTED
        self._move(sequence, State.RUNNING if preempted else State.RECEIVING)

    def run(self, sequence: SequenceId) -> None:
        """The request has its KV, or all of it that comes from others: it is in the batch from the next step on."""
        self._move(sequence, State.RUNNING)

    def batch(self) -> list[SequenceId]:
        """The requests of the next step, the first in order first."""
        return self._in_order(State.RUNNING)

    def receiving(self) -> list[SequenceId]:
        """The requests whose KV is on its way."""
        return self._in_order(State.RECEIVING)

    def holders(self) -> list[SequenceId]:
        """The requests that hold pages, the last in order first."""
        return self._in_order(State.RECEIVING, State.RUNNING)[::-1]

    def victims(self, of: SequenceId | None = None) -> list[SequenceId]:
        """Running requests to preempt, in this order: the lowest class, and of that the youngest.

        `of`: so that this request may be admitted; then only those of a lower class that come after it.
        """
        running = [sequence for sequence, e in self._entries.items() if e.state is State.RUNNING]
        if of is not None:
            first = self._entries[of]
            running = [s for s in running if (e := self._entries[s]).rank > first.rank and e.order > first.order]
        return sorted(running, key=lambda s: (self._entries[s].order, s), reverse=True)

    def preempted(self, sequence: SequenceId) -> None:
        """The request's pages are in host memory now."""
        self._move(sequence, State.PREEMPTED)

    def remove(self, sequence: SequenceId) -> None:
        """Forgets a request in whatever state."""
        if sequence in self._entries:
            self._move(sequence, State.DONE)
            del self._entries[sequence]

    def count(self, *states: State) -> int:
        return sum(entry.state in states for entry in list(self._entries.values()))

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of requests that wait for pages."""
        entries = list(self._entries.values())
        return sum(entry.prompt_tokens for entry in entries if entry.state is State.WAITING)

    def _in_order(self, *states: State) -> list[SequenceId]:
        found = [sequence for sequence, entry in self._entries.items() if entry.state in states]
        return sorted(found, key=lambda sequence: (self._entries[sequence].order, sequence))

    def _move(self, sequence: SequenceId, to: State) -> None:
        entry = self._entries[sequence]
        assert to in LEGAL[entry.state], f"{entry.state} to {to}"
        entry.state = to
