"""Computes a step: the newest token of each running request, and chunks of those with a backlog."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kvtransfer.page import Section, packed_range
from ..model.attention import Attend
from ..model.hidden import HiddenStates
from ..model.model import Model
from ..proto.errors import IsthmusError
from ..worker.step_plan import SequenceId, SequencePages, SequencePlan, StepBatch
from .graphs import PaddedSteps
from .pool.base import KvPool
from .pool.local import LocalPrompt, needs_raw


class DecodeRunner:
    """One forward pass over a ragged batch. The engine thread alone uses it.

    It owns the KV, as computed, of prompts that are computed here (`pool/local.py`): from `open_prompt` to
    `close_prompt`.
    """

    def __init__(
        self, model: Model, pool: KvPool, padded: PaddedSteps | None = None, *, before_layer: Callable[[], None]
    ) -> None:
        """`before_layer` is called before each layer's attention; within recorded steps nothing is."""
        self._model, self._pool, self._padded, self._before_layer = model, pool, padded, before_layer
        self._local: dict[SequenceId, LocalPrompt] = {}
        self.graph_steps = 0  # that were recorded ones

    @property
    def local_bytes(self) -> int:
        """Of prompts that are computed here, beside the pool. From any thread."""
        return sum(local.nbytes for local in list(self._local.values()))

    def open_prompt(self, plan: SequencePlan, pages: SequencePages) -> None:
        """Prepares what a chunk of a prompt needs beside the pool, which it keeps for the chunks to come.

        A plan that is not about a prompt, or of a prompt that is open already, needs nothing.
        """
        if not plan.in_prompt or plan.sequence in self._local:
            return
        model, codec, page_tokens = self._model, self._pool.codec(pages), self._pool.page_tokens
        packed_end = packed_range(plan.prompt_tokens, page_tokens, codec.packs)[1]
        if self._pool.rounds_endings and plan.end == plan.prompt_tokens and plan.start >= packed_end:
            return
        if not needs_raw(codec, model.dtype, plan.start, plan.prompt_tokens, page_tokens):
            return
        local = LocalPrompt(model.layers, codec, plan.prompt_tokens, page_tokens, model.dtype, model.device)
        for layer in range(len(model.layers) if plan.start else 0):
            local.fill(layer, *self._pool.read_prefix(pages, plan.start, layer))
        self._local[plan.sequence] = local

    def prompt_failure(self, sequence: SequenceId) -> IsthmusError | None:
        """Why the KV of a prompt that is computed here cannot be stored (a NaN, say)."""
        local = self._local.get(sequence)
        return local.failure if local else None

    def close_prompt(self, sequence: SequenceId) -> None:
        """Frees what `open_prompt` has made; harmless where that is nothing."""
        self._local.pop(sequence, None)

    def run(self, batch: StepBatch, on_hidden: Callable[[HiddenStates, Sequence[int]], None] | None = None) -> Tensor:
        """Stores the KV of the tokens; returns the logits [R, vocabulary] of the R that sample, in order.

        Prompts in it are open. The logits are good until the next step. `on_hidden` gets the final hidden states, and
        in which row of them the tokens of each sequence begin.
        """
        is_local = [plan.in_prompt and plan.sequence in self._local for plan in batch.sequences]
        is_eager = any(is_local) or on_hidden is not None
        shape = self._padded.shape_of(batch) if self._padded and not is_eager else None
        if self._padded and shape:
            self.graph_steps += 1
            return self._padded.run(batch, shape)
        # Those with KV of their own stand last: the pool attends to one block of rows.
        order = sorted(range(len(is_local)), key=is_local.__getitem__)
        token_ids, positions, last_row = [], [], {}
        for index in order:
            plan = batch.sequences[index]
            token_ids += batch.token_ids[index]
            positions += range(plan.start, plan.end)
            last_row[plan.sequence] = len(token_ids) - 1
        rows = [last_row[plan.sequence] for plan in batch.sequences if plan.samples]
        first_rows = [last_row[plan.sequence] + 1 - plan.tokens for plan in batch.sequences]
        device = self._model.device
        return self._model.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(rows, device=device, dtype=torch.long),
            self._attend(batch, is_local),
            None if on_hidden is None else lambda hidden: on_hidden(hidden, first_rows),
        )

    def _attend(self, batch: StepBatch, is_local: list[bool]) -> Attend:
        pooled, local = batch, None
        if any(is_local):
            pooled, local = batch.select([not own for own in is_local]), batch.select(is_local)
        in_pool = self._pool.attend_step(pooled) if pooled.sequences else None
        pooled_rows = sum(plan.tokens for plan in pooled.sequences)

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            self._before_layer()
            if in_pool and local is None:
                return in_pool(layer, q_THD, k_THD, v_THD, scale)
            assert local is not None
            row, outs = pooled_rows, []
            if in_pool:
                outs.append(in_pool(layer, q_THD[:row], k_THD[:row], v_THD[:row], scale))
            for plan, pages in zip(local.sequences, local.pages, strict=True):
                rows = slice(row, row + plan.tokens)
                outs.append(self._attend_local(plan, pages, layer, q_THD[rows], k_THD[rows], v_THD[rows], scale))
                row = rows.stop
            return torch.cat(outs)

        return attend

    def _attend_local(
        self,
        plan: SequencePlan,
        pages: SequencePages,
        layer: int,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        scale: float,
    ) -> Tensor:
        def write(layer: int, section: Section, keys: Tensor, values: Tensor) -> None:
            self._pool.write_section(pages, layer, section, keys, values)

        return self._local[plan.sequence].attend(layer, plan.start, q_THD, k_THD, v_THD, scale, write)
