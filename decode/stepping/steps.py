"""What a step computes: one token of each running request, and chunks of those that are behind. Pure.

A request is behind where tokens are known whose KV is not there: its prompt, where this worker computes it itself, or
output of a lost decode worker that is replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ...proto.priority import BATCH_RANK
from ..sequences.scheduler import SequenceId

OPEN_PROMPTS = 4  # computed here at once
AGEING_TOKENS_PER_S = 500.0  # what waiting is worth against a shorter remainder
NEAR_PAGES = 4  # so long at most does replayed output hold up other prompts
RANK_TOKENS = 2048  # what one class of priority is worth against a shorter remainder


@dataclass(frozen=True)
class Backlog:
    """A request that holds its pages, and how far its KV is."""

    sequence: SequenceId
    computed: int  # tokens with KV
    known: int  # tokens of prompt and output
    prompt: int
    opened: bool  # its prompt is being computed here
    rank: int  # of its priority; the lowest goes first
    waited_s: float
    raw_tokens: int = 0  # of memory beside the pool that its prompt takes while it is computed here

    @property
    def behind(self) -> bool:
        """More than the newest token's KV is missing."""
        return self.computed < self.prompt or self.computed + 1 < self.known

    @property
    def begun(self) -> bool:
        """Its client has tokens already, and waits: not batch work."""
        return self.known > self.prompt and self.rank < BATCH_RANK


class HasAlone(Protocol):
    """A request that may have to be in steps of its own."""

    alone: bool


Alone = TypeVar("Alone", bound=HasAlone)


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one request."""

    sequence: SequenceId
    start: int
    end: int


def take_turns(sequences: Sequence[Alone], turn: int) -> list[list[Alone]]:
    """Who may be in one step together, in the order of whose turn it is: each that is `alone`, and all the others."""
    groups = [[sequence] for sequence in sequences if sequence.alone]
    if others := [sequence for sequence in sequences if not sequence.alone]:
        groups.append(others)
    first = turn % len(groups) if groups else 0
    return groups[first:] + groups[:first]


def plan_step(
    backlogs: Sequence[Backlog],
    *,
    page_tokens: int,
    budget: int,
    opened_elsewhere: int = 0,
    raw_tokens: int | None = None,
) -> list[Chunk]:
    """The chunks of the next step: a token of each request that is not behind, then `budget` tokens for the others.

    Those with least left go first, with ageing and priority, so that a long prompt delays a short one by one step. A
    step that works on an answer that has begun, and has `NEAR_PAGES` or less to its end, takes in no prompt of one that
    has not.
    A chunk of output ends with the page that its first token lies in, because the next page's tokens must find that
    one as it was when they were first drawn (packed, where it has become old by then). Chunks of a prompt end with
    a page or with the prompt. `opened_elsewhere`: prompts of requests that take no part in this step.
    Prompts that are computed here take `raw_tokens` of memory beside the pool at most (None: no bound); the first that
    has to wait for it keeps those behind it from beginning.
    """
    chunks = [Chunk(b.sequence, b.computed, b.known) for b in backlogs if not b.behind]
    open_prompts = opened_elsewhere + sum(b.opened for b in backlogs)
    raw_left = None if raw_tokens is None else raw_tokens - sum(b.raw_tokens for b in backlogs if b.opened)
    resumed = False
    for backlog in sorted((b for b in backlogs if b.behind), key=lambda b: (not b.begun, _urgency(b))):
        if resumed and not backlog.begun:
            break
        start = backlog.computed
        opens = start < backlog.prompt and not backlog.opened
        if opens and raw_left is not None and backlog.raw_tokens > raw_left:
            open_prompts = OPEN_PROMPTS
        if budget <= 0 or (opens and open_prompts >= OPEN_PROMPTS):
            continue
        if start >= backlog.prompt:
            end = min(backlog.known, start - start % page_tokens + page_tokens, start + budget)
        else:
            end = min(backlog.prompt, start + budget)
            if end < backlog.prompt:
                end -= end % page_tokens
            if end <= start:
                continue  # less than a page is left of the budget
        near = backlog.known - start <= NEAR_PAGES * page_tokens
        if opens and raw_left is not None:
            raw_left -= backlog.raw_tokens
        open_prompts, resumed = open_prompts + opens, resumed or (backlog.begun and near)
        budget -= end - start
        chunks.append(Chunk(backlog.sequence, start, end))
    return chunks


def _urgency(backlog: Backlog) -> float:
    left = backlog.known - backlog.computed
    return left + RANK_TOKENS * backlog.rank - AGEING_TOKENS_PER_S * backlog.waited_s
