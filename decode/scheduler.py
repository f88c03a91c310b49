"""Which requests hold pages, which of them are stepped, who makes room, and what a step computes.

Pure: capacity and time come in as arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from ..worker.step_plan import SequenceId, SequencePlan, StepPlan
from .step_selection import Progress, select_tokens, take_turns

AGEING_S = 30.0  # of waiting that make up for one class of priority
ALONE_TOKENS = 2  # drawn in steps of its own: the first may be one that was drawn before, and not passed on

AllocatePages = Callable[[Sequence[SequencePlan]], Sequence[SequencePlan]]
"""Gives sequences the pages of what is planned of them; returns the plans that have theirs now."""


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


@dataclass(kw_only=True, slots=True, eq=False)
class _Request(Progress):
    max_pages: int  # that it can come to hold
    order: float  # who goes first: the lower
    state: State = State.WAITING
    drawn: int = 0  # tokens, here


class DecodeScheduler:
    """First come, first served, but that a class of priority is worth `AGEING_S` of waiting.

    So nobody overtakes a request that has waited that much longer, and who goes first never changes: the first in
    order is never preempted, gets whatever pages it needs, and comes to its end; then the next one is the first.

    A request gets pages for its prompt and some headroom. What it may come to hold beyond that is promised as far as
    pool and host memory can hold it together: where the pool is full, enough host memory is free for any one request,
    so that somebody can always make room and nothing waits for ever.
    """

    def __init__(
        self,
        *,
        total_pages: int,
        page_tokens: int,
        max_batch: int,
        chunk_tokens: int,
        idle_chunk_tokens: int,
        raw_tokens: int,
        host_pages: int = 0,
        saved_extra_pages: int = 0,
    ) -> None:
        """`chunk_tokens`: of chunks in a step beside running requests, a page at least; `idle_chunk_tokens`: where
        nobody runs. `raw_tokens`: of prompts that may be computed here at once, with raw KV beside the pool.

        `host_pages`: of preempted requests that host memory may hold; 0: nobody is preempted.
        `saved_extra_pages`: how many more of these one preempted request takes than it had pages, at most.
        """
        self.total_pages, self.page_tokens = total_pages, page_tokens
        self._max_batch = max_batch
        self._chunk_tokens = max(page_tokens, chunk_tokens)
        self._idle_chunk_tokens = max(self._chunk_tokens, idle_chunk_tokens)
        self._raw_tokens = raw_tokens
        self._host_pages, self._saved_extra = host_pages, saved_extra_pages
        self._turn = 0
        self._requests: dict[SequenceId, _Request] = {}

    def add_request(
        self,
        sequence: SequenceId,
        *,
        prompt_tokens: int,
        output_tokens: int = 0,
        max_tokens: int,
        rank: int,
        arrived_s: float,
        alone: bool = False,
    ) -> None:
        """Queues a request that can come to hold `max_tokens`, its prompt included.

        `output_tokens`: that a lost worker has drawn already. `alone`: it shares no step with others, until it has
        drawn ALONE_TOKENS here, which shows that it is no danger to them.
        """
        self._requests[sequence] = _Request(
            sequence=sequence,
            prompt_tokens=prompt_tokens,
            known=prompt_tokens + output_tokens,
            rank=rank,
            arrived_s=arrived_s,
            alone=alone,
            max_pages=-(-max_tokens // self.page_tokens),
            order=arrived_s + rank * AGEING_S,
        )

    def queue(self) -> list[SequenceId]:
        """The requests that wait for pages, the next one first. One that does not fit blocks the later ones."""
        return self._in_order(State.WAITING, State.PREEMPTED)

    def has_slot(self) -> bool:
        """Whether one more request may hold pages, however many there are."""
        return self.count(State.RECEIVING, State.RUNNING) < self._max_batch

    def is_promised(self, sequence: SequenceId) -> bool:
        """Whether all that the request may come to hold finds room in pool and host memory, beside the others'."""
        request = self._requests[sequence]
        if request.state is State.PREEMPTED:
            return True
        pages = [r.max_pages for r in list(self._requests.values()) if r.state is not State.WAITING]
        pages.append(request.max_pages)
        if sum(pages) <= self.total_pages:
            return True
        saved = [count + self._saved_extra for count in pages]
        return sum(saved) <= self.total_pages + self._host_pages - max(saved)

    def state(self, sequence: SequenceId) -> State:
        return self._requests[sequence].state

    def mark_allocated(self, sequence: SequenceId) -> None:
        """The request holds its pages now: new ones, or those that it had before it was preempted."""
        preempted = self._requests[sequence].state is State.PREEMPTED
        self._move(sequence, State.RUNNING if preempted else State.RECEIVING)

    def mark_running(self, sequence: SequenceId, *, computed: int, known: int, raw_tokens: int = 0) -> None:
        """The request has its KV, or all of it that comes from others: it is in the batch from the next step on.

        `computed` of its `known` tokens have KV. `raw_tokens`: of memory beside the pool that computing the rest of
        its prompt takes.
        """
        self._move(sequence, State.RUNNING)
        request = self._requests[sequence]
        request.computed, request.known, request.raw_tokens = computed, known, raw_tokens

    def plan(self, now_s: float, allocate: AllocatePages) -> StepPlan:
        """The next step; empty where there is nothing to do, or nobody gets the pages for it.

        Who is `alone`, and all the others together, take turns; where those whose turn it is get no pages, the next
        ones are tried.
        """
        self._turn += 1
        running = [self._requests[sequence] for sequence in self.batch()]
        awaited = [request for request in self._requests.values() if request.state is State.RECEIVING]
        for group in take_turns(running, self._turn):
            plans = allocate(self._plan_group(group, running, awaited, now_s))
            if plans:
                for plan in plans:
                    self._requests[plan.sequence].opened |= plan.in_prompt
                return StepPlan(tuple(plans))
        return StepPlan(())

    def _plan_group(
        self, group: Sequence[_Request], running: Sequence[_Request], awaited: Sequence[_Request], now_s: float
    ) -> list[SequencePlan]:
        elsewhere = [r for r in running if r.is_open and r not in group] if len(group) < len(running) else []
        return select_tokens(
            group,
            now_s=now_s,
            page_tokens=self.page_tokens,
            budget=self._budget(group, awaited),
            open_elsewhere=len(elsewhere),
            raw_tokens=self._raw_tokens - sum(request.raw_tokens for request in elsewhere),
        )

    def _budget(self, group: Sequence[_Request], awaited: Sequence[_Request]) -> int:
        """Tokens of chunks: the fewer, the worse it is to wait for the step. `awaited` will join a later one."""
        resuming = any(request.has_backlog and request.resumes for request in group)
        if not resuming and any(request.resumes for request in awaited):
            return self.page_tokens  # a client in the middle of its answer would wait for somebody else's prompt
        if awaited or any(not request.has_backlog for request in group):
            return self._chunk_tokens
        return self._idle_chunk_tokens

    def complete(self, plan: StepPlan) -> None:
        """A step was computed, and a token drawn for each sequence that samples."""
        for done in plan.sequences:
            request = self._requests[done.sequence]
            request.computed = done.end
            if done.samples:
                request.known += 1
                request.drawn += 1
                request.alone = request.alone and request.drawn < ALONE_TOKENS

    def batch(self) -> list[SequenceId]:
        """The requests of the next step, the first in order first."""
        return self._in_order(State.RUNNING)

    def holders(self) -> list[SequenceId]:
        """The requests that hold pages, the last in order first."""
        return self._in_order(State.RECEIVING, State.RUNNING)[::-1]

    def victims(self, of: SequenceId | None = None) -> list[SequenceId]:
        """Running requests to preempt, in this order: the lowest class, and of that the youngest.

        `of`: so that this request may get pages; then only those of a lower class that come after it.
        """
        running = [sequence for sequence, r in self._requests.items() if r.state is State.RUNNING]
        if of is not None:
            first = self._requests[of]
            running = [s for s in running if (r := self._requests[s]).rank > first.rank and r.order > first.order]
        return sorted(running, key=lambda s: (self._requests[s].order, s), reverse=True)

    def mark_preempted(self, sequence: SequenceId) -> None:
        """The request's pages are in host memory now."""
        self._move(sequence, State.PREEMPTED)

    def remove_request(self, sequence: SequenceId) -> None:
        """Forgets a request in whatever state."""
        if sequence in self._requests:
            self._move(sequence, State.DONE)
            del self._requests[sequence]

    def count(self, *states: State) -> int:
        return sum(request.state in states for request in list(self._requests.values()))

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of requests that wait for pages."""
        requests = list(self._requests.values())
        return sum(request.prompt_tokens for request in requests if request.state is State.WAITING)

    def _in_order(self, *states: State) -> list[SequenceId]:
        found = [sequence for sequence, request in self._requests.items() if request.state in states]
        return sorted(found, key=lambda sequence: (self._requests[sequence].order, sequence))

    def _move(self, sequence: SequenceId, to: State) -> None:
        request = self._requests[sequence]
        assert to in LEGAL[request.state], f"{request.state} to {to}"
        request.state = to
