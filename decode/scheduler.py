"""Which requests hold pages and which of them are stepped. Pure: capacity comes in as arguments."""

from dataclasses import dataclass
from enum import Enum
from typing import NewType

from ..proto.errors import Exhausted, InvalidRequest

SequenceId = NewType("SequenceId", int)


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
    pages: int
    prompt_tokens: int
    state: State = State.WAITING


class DecodeScheduler:
    """First come, first served, by pages.

    A request gets the pages of its prompt and of all tokens it may make at once, before anything is computed for
    it: whoever holds pages can run to its end, so that nothing ever waits for a page while holding others.
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

    def add(self, sequence: SequenceId, prompt_tokens: int, tokens: int) -> None:
        """Queues a request that can come to hold `tokens`, its prompt included."""
        self._entries[sequence] = _Entry(-(-tokens // self.page_tokens), prompt_tokens)

    def admit(self, free_pages: int) -> list[tuple[SequenceId, int]]:
        """The requests that get their pages now, with the number of pages, oldest first."""
        admitted = []
        holding = len(self._entries) - self.count(State.WAITING)
        for sequence, entry in self._entries.items():
            if entry.state is not State.WAITING:
                continue
            if entry.pages > free_pages or holding >= self._max_batch:
                break
            free_pages -= entry.pages
            holding += 1
            self._move(sequence, State.RECEIVING)
            admitted.append((sequence, entry.pages))
        return admitted

    def run(self, sequence: SequenceId) -> None:
        """The request's KV is complete: it is in the batch from the next step on."""
        self._move(sequence, State.RUNNING)

    def batch(self) -> list[SequenceId]:
        """The requests of the next step, oldest first."""
        return [sequence for sequence, entry in self._entries.items() if entry.state is State.RUNNING]

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

    def _move(self, sequence: SequenceId, to: State) -> None:
        entry = self._entries[sequence]
        assert to in LEGAL[entry.state], f"{entry.state} to {to}"
        entry.state = to
