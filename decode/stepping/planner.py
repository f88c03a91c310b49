"""From running requests to the work of the next step; opens prompts that are computed here."""

import time
from collections.abc import Iterator, Sequence

from ...kvtransfer.page import packed_range
from ...model.model import Model
from ...proto.priority import BATCH_RANK
from ...worker.chunks import chunk_tokens_for
from ..pool.base import KvStore
from ..sequences.local_prompt import LocalPrompt, needs_raw
from ..sequences.sequence import Advance, DecodeSequence
from .steps import Backlog, plan_step, take_turns


class StepPlanner:
    """Applies `plan_step` to requests. The engine thread alone uses it."""

    def __init__(self, model: Model, store: KvStore, *, page_tokens: int, chunk_tokens: int, local_tokens: int) -> None:
        """`local_tokens`: of prompts that may be computed here at once, beside the pool."""
        self._model, self._store, self._local_tokens = model, store, local_tokens
        self._page_tokens, self._chunk_tokens = page_tokens, max(page_tokens, chunk_tokens)
        self._turn = 0
        self._idle_chunk_tokens = max(self._chunk_tokens, chunk_tokens_for(model.device, page_tokens))

    def plans(
        self, running: Sequence[DecodeSequence], awaited: Sequence[DecodeSequence] = ()
    ) -> Iterator[list[Advance]]:
        """What the next step may be, in this order: one of these is made. `awaited` will join a later one."""
        self._turn += 1
        for group in take_turns(running, self._turn):
            elsewhere = [sequence for sequence in running if _is_opened(sequence) and sequence not in group]
            if work := self.plan(group, awaited, elsewhere):
                yield work

    def plan(
        self,
        running: Sequence[DecodeSequence],
        awaited: Sequence[DecodeSequence] = (),
        elsewhere: Sequence[DecodeSequence] = (),
    ) -> list[Advance]:
        """The work of a step in which all `running` may take part; `elsewhere`: others whose prompts are open."""
        now_s = time.monotonic()
        backlogs = [self._backlog(sequence, now_s) for sequence in running]
        budget = self._budget(backlogs, awaited)
        by_id = {sequence.id: sequence for sequence in running}
        raw_left = self._local_tokens - sum(self._raw_tokens(sequence) for sequence in elsewhere)
        chunks = plan_step(
            *(backlogs,),
            page_tokens=self._page_tokens,
            budget=budget,
            opened_elsewhere=len(elsewhere),
            raw_tokens=raw_left,
        )
        return [Advance(by_id[chunk.sequence], chunk.start, chunk.end) for chunk in chunks]

    def _budget(self, backlogs: Sequence[Backlog], awaited: Sequence[DecodeSequence]) -> int:
        """Tokens of chunks: the fewer, the worse it is to wait for the step."""
        resuming = any(backlog.behind and backlog.begun for backlog in backlogs)
        if not resuming and any(sequence.output and sequence.rank < BATCH_RANK for sequence in awaited):
            return self._page_tokens  # a client in the middle of its answer would wait for somebody else's prompt
        if awaited or any(not backlog.behind for backlog in backlogs):
            return self._chunk_tokens
        return self._idle_chunk_tokens

    def open_prompt(self, advance: Advance) -> None:
        """Prepares what the first chunk of a prompt needs."""
        if advance.in_prompt and not advance.sequence.timing.began_s:
            advance.sequence.timing.began_s = time.monotonic()
            self._open(advance.sequence, advance.end)

    def _open(self, sequence: DecodeSequence, end: int) -> None:
        model, tokens = self._model, len(sequence.prompt)
        packed_end = packed_range(tokens, self._page_tokens, sequence.codec.packs)[1]
        if self._store.rounds_endings and end == tokens and sequence.computed >= packed_end:
            return
        if needs_raw(sequence.codec, model.dtype, sequence.computed, tokens, self._page_tokens):
            sequence.local = LocalPrompt(
                *(model.layers, sequence.codec, tokens, self._page_tokens, model.dtype, model.device)
            )
            for layer in range(len(model.layers) if sequence.held else 0):
                sequence.local.fill(layer, *self._store.read_held(sequence, layer))

    def _backlog(self, sequence: DecodeSequence, now_s: float) -> Backlog:
        return Backlog(
            sequence=sequence.id,
            computed=sequence.computed,
            known=sequence.length,
            prompt=len(sequence.prompt),
            opened=_is_opened(sequence),
            rank=sequence.rank,
            waited_s=now_s - sequence.arrived_s,
            raw_tokens=self._raw_tokens(sequence),
        )

    def _raw_tokens(self, sequence: DecodeSequence) -> int:
        """Of a prompt that takes memory beside the pool, or may come to; 0 for others."""
        takes = sequence.local or (not _is_opened(sequence) and self._may_need_raw(sequence))
        return len(sequence.prompt) if takes else 0

    def _may_need_raw(self, sequence: DecodeSequence) -> bool:
        """Whether a prompt that has not begun may need memory beside the pool."""
        prompt = len(sequence.prompt)
        return needs_raw(sequence.codec, self._model.dtype, sequence.computed, prompt, self._page_tokens)


def _is_opened(sequence: DecodeSequence) -> bool:
    return bool(sequence.timing.began_s) and sequence.computed < len(sequence.prompt)
