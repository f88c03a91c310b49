"""From running requests to the work of the next step; opens prompts that are computed here."""

import time
from collections.abc import Sequence

from ..kvtransfer.page import packed_range
from ..model.model import Model
from .local_prompt import LocalPrompt, needs_raw
from .sequence import Advance, DecodeSequence
from .steps import Backlog, plan_step
from .store import KvStore

IDLE_CHUNK_TOKENS = 512  # computed in a step that no other request waits for


class StepPlanner:
    """Applies `plan_step` to requests. The engine thread alone uses it."""

    def __init__(self, model: Model, store: KvStore, *, page_tokens: int, chunk_tokens: int) -> None:
        self._model, self._store = model, store
        self._page_tokens, self._chunk_tokens = page_tokens, max(page_tokens, chunk_tokens)

    def plan(self, running: Sequence[DecodeSequence], *, awaited: bool = False) -> list[Advance]:
        """The work of a step in which all of these may take part; `awaited`: others will join once it is done."""
        now_s = time.monotonic()
        backlogs = [_backlog(sequence, now_s) for sequence in running]
        beside = awaited or any(not backlog.behind for backlog in backlogs)
        budget = self._chunk_tokens if beside else max(self._chunk_tokens, IDLE_CHUNK_TOKENS)
        by_id = {sequence.id: sequence for sequence in running}
        chunks = plan_step(backlogs, page_tokens=self._page_tokens, budget=budget)
        return [Advance(by_id[chunk.sequence], chunk.start, chunk.end) for chunk in chunks]

    def open_prompts(self, work: Sequence[Advance]) -> None:
        """Prepares what the first chunk of a prompt needs."""
        for advance in work:
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


def _backlog(sequence: DecodeSequence, now_s: float) -> Backlog:
    return Backlog(
        sequence=sequence.id,
        computed=sequence.computed,
        known=sequence.length,
        prompt=len(sequence.prompt),
        opened=bool(sequence.timing.began_s) and sequence.computed < len(sequence.prompt),
        rank=sequence.rank,
        waited_s=now_s - sequence.arrived_s,
    )
