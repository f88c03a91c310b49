"""Runs chunks of several prompts through the model and sends each layer's pages while the next layers compute."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.attention.dense import Span, ragged_attention
from ..kvtransfer.encoded import EncodedSection
from ..kvtransfer.page import Section
from ..kvtransfer.pool.dense import DensePool
from ..model.model import Model
from ..proto.errors import IsthmusError
from .job import PrefillJob
from .scheduler import Chunk


class PrefillRunner:
    """One forward pass over a ragged batch of chunks. The engine thread alone uses it."""

    def __init__(self, model: Model, pool: DensePool, before_layer: Callable[[], None]) -> None:
        """`before_layer` is called before each layer's attention, and may run other chunks meanwhile."""
        self._model, self._pool, self._before_layer = model, pool, before_layer

    def run(self, work: Sequence[tuple[PrefillJob, Chunk]]) -> Tensor:
        """Computes the chunks, stores their KV and queues its sections in the jobs' outboxes.

        Returns the logits [number of last chunks, vocabulary] of the prompts that are complete now, in order.
        """
        token_ids, positions, spans, last_rows = [], [], [], []
        for job, chunk in work:
            ranges = tuple(self._pool.slots(job.runs, 0, chunk.end))
            spans.append(Span(len(token_ids), chunk.end - chunk.start, chunk.start, ranges))
            token_ids += job.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            if chunk.last:
                last_rows.append(len(token_ids) - 1)
        due = [job.begin_chunk(chunk.end) for job, chunk in work]
        attend = self._attend(work, spans, due)
        device = self._model.device
        return self._model.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(last_rows, device=device, dtype=torch.long),
            attend,
        )

    def _attend(
        self, work: Sequence[tuple[PrefillJob, Chunk]], spans: list[Span], due: list[list[Section]]
    ) -> Callable[[int, Tensor, Tensor, Tensor, float], Tensor]:
        pool, windows = self._pool, [layer.window for layer in self._model.layers]

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            self._before_layer()
            for (job, chunk), span in zip(work, spans, strict=True):
                rows = slice(span.row, span.row + span.new)
                pool.write(layer, job.runs, chunk.start, k_THD[rows], v_THD[rows])
            keys, values = pool.keys[layer], pool.values[layer]
            out = ragged_attention(q_THD, keys, values, spans, scale, windows[layer])
            for (job, _), job_sections in zip(work, due, strict=True):
                self._send_layer(job, layer, job_sections)
            return out

        return attend

    def _send_layer(self, job: PrefillJob, layer: int, due: list[Section]) -> None:
        """A page that cannot be encoded ends its own job only: `job.failure` says why.

        A chunk that is computed once more sends no layer twice.
        """
        if layer < job.layers_sent:
            return
        encoded: list[EncodedSection] = []
        try:
            for section in due if job.failure is None else []:
                keys, values = self._pool.read(layer, job.runs, section.start, section.end)
                encoded.append(job.sender.encode(layer, section, keys, values))
            job.outbox.put(encoded)
            job.layers_sent = layer + 1
        except IsthmusError as error:
            job.failure = error
