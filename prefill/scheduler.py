"""Which prompts are computed next, and how much of each. Pure: time, speed and pages come in as arguments."""

from collections.abc import Callable
from dataclasses import dataclass

from ..proto.priority import BATCH_RANK, RESUMED_RANK, STANDARD_RANK
from ..worker.step_plan import SequenceId, SequencePlan, StepPlan

AllocatePages = Callable[[SequenceId], int | None]
"""Gives a prompt its pages; returns how many of its tokens need not be computed, or None where it does not fit now."""


@dataclass(eq=False)
class _Prompt:
    sequence: SequenceId
    tokens: int
    arrived_s: float
    rank: int
    deadline_s: float | None
    computed: int  # or found in a cache; a guess until it has its pages
    alone: bool  # in steps of its own
    has_pages: bool = False

    @property
    def remaining(self) -> int:
        return self.tokens - self.computed


class PrefillScheduler:
    """Shortest remaining work first in chunks, under a token budget per step.

    - Interactive prompts go before standard ones. Batch prompts get what is left of a step.
    - Prompts of answers that resume (their decode worker was lost) go before all, in steps of their own.
    - A prompt whose deadline can be met, but only if it is computed now, goes before others of its rank; one whose
      deadline is over is dropped.
    - A prompt that is `alone` shares its steps with nobody.
    - A long prompt delays a short one by the chunk in work and no more. So that short ones cannot starve it, waiting
      earns a prompt `ageing_tokens_per_s`: the one that is first when that counts gets a quarter of each step.
    - A prompt gets all its pages with its first chunk and keeps them to its last, so that two half-computed prompts
      can never wait for each other.
    """

    def __init__(self, *, chunk_tokens: int, page_tokens: int, ageing_tokens_per_s: float = 500.0) -> None:
        assert chunk_tokens % page_tokens == 0, "chunks end on page boundaries"
        self._chunk_tokens, self._page_tokens = chunk_tokens, page_tokens
        self._ageing = ageing_tokens_per_s
        self._share = chunk_tokens // 4 // page_tokens * page_tokens
        self._steps = 0
        self._prompts: dict[SequenceId, _Prompt] = {}

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        return sum(prompt.remaining for prompt in list(self._prompts.values()))

    def add_request(
        self,
        sequence: SequenceId,
        tokens: int,
        now_s: float,
        *,
        cached: int = 0,
        rank: int = STANDARD_RANK,
        deadline_s: float | None = None,
        alone: bool = False,
    ) -> None:
        """Queues a prompt. `cached`: how many of its tokens will probably not have to be computed."""
        self._prompts[sequence] = _Prompt(sequence, tokens, now_s, rank, deadline_s, cached, alone)

    def remove_request(self, sequence: SequenceId) -> None:
        """Forgets a prompt, computed or not."""
        self._prompts.pop(sequence, None)

    def expired(self, now_s: float) -> list[SequenceId]:
        """Prompts whose deadline is over; they are still to be removed."""
        return [p.sequence for p in self._prompts.values() if p.deadline_s is not None and p.deadline_s <= now_s]

    def plan(self, now_s: float, tokens_per_s: float, allocate: AllocatePages) -> StepPlan:
        """The next step, whose tokens count as computed from now on; empty where there is nothing to do.

        `tokens_per_s`: how fast prompts are computed, for the look at deadlines. `allocate` is called for prompts that
        have no pages yet, in the order of their turn; the first that does not fit blocks the later ones, or it would
        never get its pages.
        """
        step = _Step(self._chunk_tokens, self._page_tokens, allocate)
        self._add_resuming(step)
        if resuming := step.plan():
            return resuming
        if aged := self._aged(now_s):
            step.add(aged, self._aged_share(whole_steps=aged.alone))
        for prompt in sorted(self._prompts.values(), key=lambda p: self._turn(p, now_s, tokens_per_s)):
            step.add(prompt, step.budget)
        return step.plan()

    def plan_resuming(self, allocate: AllocatePages) -> StepPlan:
        """The same for prompts of answers that resume, and no others: these may be in the middle of a step."""
        step = _Step(self._chunk_tokens, self._page_tokens, allocate)
        self._add_resuming(step)
        return step.plan()

    def _add_resuming(self, step: "_Step") -> None:
        resuming = (prompt for prompt in self._prompts.values() if prompt.rank == RESUMED_RANK)
        for prompt in sorted(resuming, key=lambda p: p.remaining):
            step.add(prompt, step.budget)

    def _turn(self, prompt: _Prompt, now_s: float, tokens_per_s: float) -> tuple[int, bool, float]:
        if prompt.deadline_s is not None:
            slack_s = prompt.deadline_s - now_s - prompt.remaining / tokens_per_s
            if 0 <= slack_s < 2 * self._chunk_tokens / tokens_per_s:
                return (prompt.rank, False, prompt.deadline_s)
        return (prompt.rank, True, prompt.remaining)

    def _aged(self, now_s: float) -> _Prompt | None:
        """The prompt that has waited longest for its length. Batch work has no claim beside others."""
        prompts = self._prompts.values()
        claims = [p for p in prompts if p.rank < BATCH_RANK] or prompts
        return min(claims, key=lambda p: p.remaining - self._ageing * (now_s - p.arrived_s), default=None)

    def _aged_share(self, *, whole_steps: bool) -> int:
        """A quarter of each step, or every fourth step: where a quarter is less than a page, or nobody may share it."""
        self._steps += 1
        return (0 if whole_steps else self._share) or (self._chunk_tokens if self._steps % 4 == 0 else 0)


class _Step:
    """A step while its tokens are handed out; a prompt may get some twice."""

    def __init__(self, budget: int, page_tokens: int, allocate: AllocatePages) -> None:
        self.budget, self._page_tokens, self._allocate = budget, page_tokens, allocate
        self._may_allocate = True
        self._is_taken = False  # by a prompt that shares it with nobody
        self._worked: dict[SequenceId, tuple[_Prompt, int]] = {}  # with the start of what it gets

    def add(self, prompt: _Prompt, limit: int) -> None:
        """Adds the next tokens of a prompt, at most `limit`: whole pages, or all that remain."""
        if limit < self._page_tokens and limit < prompt.remaining:
            return
        if self._worked and prompt.sequence not in self._worked and (prompt.alone or self._is_taken):
            return
        if not prompt.has_pages and not self._allocate_pages(prompt):
            return
        tokens = min(prompt.remaining, limit)
        if tokens < prompt.remaining:
            tokens -= tokens % self._page_tokens
        if tokens:
            self._worked.setdefault(prompt.sequence, (prompt, prompt.computed))
            self._is_taken = prompt.alone
            prompt.computed += tokens
            self.budget -= tokens

    def plan(self) -> StepPlan:
        """What was handed out, in that order."""
        return StepPlan(
            tuple(
                SequencePlan(prompt.sequence, start, prompt.computed, prompt.tokens, prompt.remaining == 0)
                for prompt, start in self._worked.values()
            )
        )

    def _allocate_pages(self, prompt: _Prompt) -> bool:
        cached = self._allocate(prompt.sequence) if self._may_allocate else None
        if cached is None:
            self._may_allocate = False
            return False
        prompt.computed, prompt.has_pages = cached, True
        return True
