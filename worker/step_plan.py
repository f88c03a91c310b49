"""What one step computes, as values: a scheduler returns a `StepPlan`, a runner executes a `StepBatch`.

Neither refers to a live object. Both consist of numbers, strings and tuples alone, so that another process (a rank of
tensor parallelism, a simulator) can have them too:

1. `PrefillScheduler.plan` and `DecodeScheduler.plan` return a `StepPlan`;
2. the engine adds token ids and page slots: a `StepBatch`;
3. the runner computes that with nothing but its model and its pool.

A draft of speculative decoding (token ids after `end`) and an adapter (its name) will be fields of `SequencePlan`.
"""

from dataclasses import dataclass
from itertools import compress
from typing import NewType

SequenceId = NewType("SequenceId", int)
"""One request in one engine."""


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """The tokens at positions [start, end) of a sequence: the step computes them and stores their KV."""

    sequence: SequenceId
    start: int
    end: int
    prompt_tokens: int  # of the whole prompt; positions from there on are output
    samples: bool  # the logits of the last of these tokens are wanted, to draw the next one

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def in_prompt(self) -> bool:
        """Whether the tokens belong to a prompt; no plan goes from a prompt into its output."""
        return self.start < self.prompt_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step computes, in the order in which the logits are returned. No sequence is in it twice."""

    sequences: tuple[SequencePlan, ...]

    def __bool__(self) -> bool:
        return bool(self.sequences)

    @property
    def tokens(self) -> int:
        return sum(plan.end - plan.start for plan in self.sequences)


@dataclass(frozen=True, slots=True)
class SequencePages:
    """Where the pages of a sequence lie in a pool, and in which form."""

    slots: tuple[int, ...]  # of the pages from the first on, to that of the last planned token at least
    codec: str  # that packs them
    packed: tuple[int, int] = (0, 0)  # pages [from, to) have slots of packed pages, all others of raw pages


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A plan with all that a runner needs to execute it; the three tuples have one item for each sequence."""

    sequences: tuple[SequencePlan, ...]
    token_ids: tuple[tuple[int, ...], ...]  # of the planned tokens
    pages: tuple[SequencePages, ...]

    def select(self, wanted: list[bool]) -> "StepBatch":
        """The part of the batch that is about some of its sequences."""
        return StepBatch(
            tuple(compress(self.sequences, wanted)),
            tuple(compress(self.token_ids, wanted)),
            tuple(compress(self.pages, wanted)),
        )
