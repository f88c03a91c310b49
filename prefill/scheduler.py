"""Which prompts are computed next, and how much of each. Pure: time and free pages come in as arguments."""

from dataclasses import dataclass
from typing import NewType

JobId = NewType("JobId", int)


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one prompt, computed in one step; `last` completes it."""

    job: JobId
    start: int
    end: int
    last: bool


@dataclass
class _Prompt:
    job: JobId
    tokens: int
    arrived_s: float
    pages: int
    computed: int = 0
    admitted: bool = False

    @property
    def remaining(self) -> int:
        return self.tokens - self.computed


class PrefillScheduler:
    """Shortest remaining work first, with ageing, in chunks under a token budget per step.

    A prompt gets all its pages with its first chunk and keeps them to its last, so that two half-computed prompts
    can never wait for each other. A long prompt delays a short one by one chunk at most; waiting earns a prompt
    `ageing_tokens_per_s`, so that short ones cannot starve it.
    """

    def __init__(self, *, chunk_tokens: int, page_tokens: int, ageing_tokens_per_s: float = 500.0) -> None:
        assert chunk_tokens % page_tokens == 0, "chunks end on page boundaries"
        self._chunk_tokens, self._page_tokens = chunk_tokens, page_tokens
        self._ageing = ageing_tokens_per_s
        self._prompts: dict[JobId, _Prompt] = {}

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        return sum(prompt.remaining for prompt in list(self._prompts.values()))

    def add(self, job: JobId, tokens: int, now_s: float) -> None:
        pages = -(-tokens // self._page_tokens)
        self._prompts[job] = _Prompt(job, tokens, now_s, pages)

    def remove(self, job: JobId) -> None:
        """Forgets a prompt, computed or not."""
        self._prompts.pop(job, None)

    def plan(self, now_s: float, free_pages: int) -> list[Chunk]:
        """The chunks of the next step, which count as computed from now on; empty where there is nothing to do."""
        order = sorted(
            self._prompts.values(),
            key=lambda p: p.remaining - self._ageing * (now_s - p.arrived_s),
        )
        chunks: list[Chunk] = []
        budget, may_admit = self._chunk_tokens, True
        for prompt in order:
            if not prompt.admitted:
                # The first that does not fit blocks those behind it, or it would never get its pages.
                may_admit = may_admit and prompt.pages <= free_pages
                if not may_admit:
                    continue
            take = min(prompt.remaining, budget)
            if take < prompt.remaining:
                take -= take % self._page_tokens
            if not take:
                continue
            if not prompt.admitted:
                prompt.admitted = True
                free_pages -= prompt.pages
            start = prompt.computed
            prompt.computed += take
            budget -= take
            chunks.append(Chunk(prompt.job, start, prompt.computed, prompt.remaining == 0))
        return chunks
