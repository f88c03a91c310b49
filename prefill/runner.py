"""Runs chunks of several prompts through the model, and says when each layer's KV is there."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.attention.dense import Span, ragged_attention
from ..kvtransfer.pool.allocator import Run
from ..kvtransfer.pool.dense import DensePool
from ..kvtransfer.pool.table import runs_of
from ..model.attention import Attend
from ..model.hidden import HiddenStates
from ..model.model import Model
from ..worker.step_plan import StepBatch


class PrefillRunner:
    """One forward pass over a ragged batch of chunks. The engine thread alone uses it."""

    def __init__(self, model: Model, pool: DensePool, before_layer: Callable[[], None]) -> None:
        """`before_layer` is called before each layer's attention, and may run other chunks meanwhile."""
        self._model, self._pool, self._before_layer = model, pool, before_layer

    def run(
        self,
        batch: StepBatch,
        after_layer: Callable[[int], None],
        on_hidden: Callable[[HiddenStates, Sequence[int]], None] | None = None,
    ) -> Tensor:
        """Computes the chunks and stores their KV; `after_layer` is called as soon as that of a layer is in the pool.

        `on_hidden` gets the final hidden states, and in which row of them each chunk begins. Returns the logits [R,
        vocabulary] of the R prompts that are complete now, in order.
        """
        token_ids, positions, spans, rows = list[int](), list[int](), list[Span](), list[int]()
        runs = [runs_of(pages.slots) for pages in batch.pages]
        for plan, ids, of in zip(batch.sequences, batch.token_ids, runs, strict=True):
            spans.append(Span(len(token_ids), plan.tokens, plan.start, tuple(self._pool.slots(of, 0, plan.end))))
            token_ids += ids
            positions += range(plan.start, plan.end)
            if plan.samples:
                rows.append(len(token_ids) - 1)
        device = self._model.device
        return self._model.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(rows, device=device, dtype=torch.long),
            self._attend(spans, runs, after_layer),
            None if on_hidden is None else lambda hidden: on_hidden(hidden, [span.row for span in spans]),
        )

    def _attend(self, spans: list[Span], runs: list[tuple[Run, ...]], after_layer: Callable[[int], None]) -> Attend:
        pool, windows = self._pool, [layer.window for layer in self._model.layers]

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            self._before_layer()
            for span, of in zip(spans, runs, strict=True):
                rows = slice(span.row, span.row + span.new)
                pool.write(layer, of, span.past, k_THD[rows], v_THD[rows])
            keys, values = pool.keys[layer], pool.values[layer]
            out = ragged_attention(q_THD, keys, values, spans, scale, windows[layer])
            after_layer(layer)
            return out

        return attend
