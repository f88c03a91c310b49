"""Computes a step: the newest token of each running request, and chunks of those whose KV is behind."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kvtransfer.page import Section
from ...model.model import Model
from ..pool.base import Attend, KvStore
from ..sequences.sequence import Advance
from .padded_steps import PaddedSteps


class DecodeRunner:
    """One forward pass over a ragged batch. The engine thread alone uses it."""

    def __init__(
        self, model: Model, store: KvStore, padded: PaddedSteps | None = None, *, before_layer: Callable[[], None]
    ) -> None:
        """`before_layer` is called before each layer's attention; within recorded steps nothing is."""
        self._model, self._store, self._padded, self._before_layer = model, store, padded, before_layer
        self.graph_steps = 0  # that were recorded ones

    def run(self, work: Sequence[Advance]) -> Tensor:
        """Stores the KV of the tokens; returns the logits [R, vocabulary] of the R that sample, in order.

        They are good until the next step.
        """
        shape = self._padded.shape_of(work) if self._padded else None
        if self._padded and shape:
            self.graph_steps += 1
            return self._padded.run(work, shape)
        device = self._model.device
        # Those with a prompt of their own stand last: the pool attends to one block of rows.
        order = sorted(work, key=lambda advance: advance.in_prompt and advance.sequence.local is not None)
        token_ids, positions, last_row = [], [], {}
        for advance in order:
            token_ids += advance.sequence.tokens(advance.start, advance.end)
            positions += range(advance.start, advance.end)
            last_row[advance.sequence.id] = len(token_ids) - 1
        rows = [last_row[advance.sequence.id] for advance in work if advance.samples]
        return self._model.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(rows, device=device, dtype=torch.long),
            self._attend(order),
        )

    def _attend(self, order: Sequence[Advance]) -> Attend:
        pooled = [advance for advance in order if not (advance.in_prompt and advance.sequence.local)]
        own = order[len(pooled) :]
        in_pool = self._store.begin_step(pooled) if pooled else None
        pooled_rows = sum(advance.end - advance.start for advance in pooled)

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            self._before_layer()
            if not own and in_pool:
                return in_pool(layer, q_THD, k_THD, v_THD, scale)
            row, outs = pooled_rows, []
            if in_pool:
                outs.append(in_pool(layer, q_THD[:row], k_THD[:row], v_THD[:row], scale))
            for advance in own:
                rows = slice(row, row + advance.end - advance.start)
                outs.append(self._attend_own(advance, layer, q_THD[rows], k_THD[rows], v_THD[rows], scale))
                row = rows.stop
            return torch.cat(outs)

        return attend

    def _attend_own(
        self, advance: Advance, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float
    ) -> Tensor:
        sequence = advance.sequence
        assert sequence.local is not None

        def put(layer: int, section: Section, keys: Tensor, values: Tensor) -> None:
            self._store.put(sequence, layer, section, keys, values)

        return sequence.local.attend(layer, advance.start, q_THD, k_THD, v_THD, scale, put)
