"""Which tokens a step computes: one token of each running request, and chunks of those with a backlog. Pure.

A request has a backlog where the KV of more than its newest token is missing: of its prompt, where this worker computes
it itself, or of output of a lost decode worker that is replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..proto.priority import BATCH_RANK
from ..worker.step_plan import SequenceId, SequencePlan

OPEN_PROMPTS = 4  # computed here at once
AGEING_TOKENS_PER_S = 500.0  # what waiting is worth against a shorter remainder
NEAR_PAGES = 4  # so long at most does replayed output hold up other prompts
RANK_TOKENS = 2048  # what one class of priority is worth against a shorter remainder


@dataclass(kw_only=True, slots=True, eq=False)
class Progress:
    """A request, and how far its KV is."""

    sequence: SequenceId
    prompt_tokens: int
    known: int  # tokens of prompt and output
    computed: int = 0  # tokens with KV
    opened: bool = False  # a chunk of its prompt was planned here
    rank: int  # of its priority; the lowest goes first
    arrived_s: float
    raw_tokens: int = 0  # of memory beside the pool that its prompt takes while it is computed here
    alone: bool = False  # in steps of its own: an engine died that computed it

    @property
    def has_backlog(self) -> bool:
        """The KV of more than the newest token is missing."""
        return self.computed < self.prompt_tokens or self.computed + 1 < self.known

    @property
    def is_open(self) -> bool:
        """Its prompt is being computed here."""
        return self.opened and self.computed < self.prompt_tokens

    @property
    def resumes(self) -> bool:
        """Its client has tokens already, and waits: not batch work."""
        return self.known > self.prompt_tokens and self.rank < BATCH_RANK

    def plan(self, end: int) -> SequencePlan:
        """To compute its next tokens up to `end`."""
        return SequencePlan(self.sequence, self.computed, end, self.prompt_tokens, end == self.known)


Request = TypeVar("Request", bound=Progress)


def take_turns(requests: Sequence[Request], turn: int) -> list[list[Request]]:
    """Who may be in one step together, in the order of whose turn it is: each that is `alone`, and all the others."""
    groups = [[request] for request in requests if request.alone]
    if others := [request for request in requests if not request.alone]:
        groups.append(others)
    first = turn % len(groups) if groups else 0
    return groups[first:] + groups[:first]


def select_tokens(
    requests: Sequence[Progress],
    *,
    now_s: float,
    page_tokens: int,
    budget: int,
    open_elsewhere: int = 0,
    raw_tokens: int | None = None,
) -> list[SequencePlan]:
    """The tokens of the next step: one of each request without a backlog, then `budget` tokens of the others.

    Those with least left go first, with ageing and priority, so that a long prompt delays a short one by one step. A
    step that works on an answer that has begun, and has `NEAR_PAGES` or less to its end, takes in no prompt of one that
    has not.
    A chunk of output ends with the page that its first token lies in, because the next page's tokens must find that
    one as it was when they were first drawn (packed, where it has become old by then). Chunks of a prompt end with
    a page or with the prompt. `open_elsewhere`: prompts of requests that take no part in this step.
    Prompts that are computed here take `raw_tokens` of memory beside the pool at most (None: no bound); the first that
    has to wait for it keeps the later ones from beginning.
    """
    plans = [request.plan(request.known) for request in requests if not request.has_backlog]
    if len(plans) == len(requests):
        return plans
    open_prompts = open_elsewhere + sum(request.is_open for request in requests)
    raw_left = None if raw_tokens is None else raw_tokens - sum(r.raw_tokens for r in requests if r.is_open)
    resumed = False
    backlogs = (request for request in requests if request.has_backlog)
    for request in sorted(backlogs, key=lambda request: (not request.resumes, _urgency(request, now_s))):
        if resumed and not request.resumes:
            break
        start = request.computed
        opens = start < request.prompt_tokens and not request.opened
        if opens and raw_left is not None and request.raw_tokens > raw_left:
            open_prompts = OPEN_PROMPTS
        if budget <= 0 or (opens and open_prompts >= OPEN_PROMPTS):
            continue
        end = _chunk_end(request, budget, page_tokens)
        if end <= start:
            continue  # less than a page is left of the budget
        near = request.known - start <= NEAR_PAGES * page_tokens
        if opens and raw_left is not None:
            raw_left -= request.raw_tokens
        open_prompts, resumed = open_prompts + opens, resumed or (request.resumes and near)
        budget -= end - start
        plans.append(request.plan(end))
    return plans


def _chunk_end(request: Progress, budget: int, page_tokens: int) -> int:
    start = request.computed
    if start >= request.prompt_tokens:
        return min(request.known, start - start % page_tokens + page_tokens, start + budget)
    end = min(request.prompt_tokens, start + budget)
    return end - end % page_tokens if end < request.prompt_tokens else end


def _urgency(request: Progress, now_s: float) -> float:
    left = request.known - request.computed
    return left + RANK_TOKENS * request.rank - AGEING_TOKENS_PER_S * (now_s - request.arrived_s)
