"""Steps a batch: one new token for each sequence in it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.attention import Span, ragged_attention
from ..kvtransfer.pool import DensePool
from ..model.model import Model
from .sequence import DecodeSequence


class DecodeRunner:
    """One forward pass over the newest token of each sequence. The engine thread alone uses it."""

    def __init__(self, model: Model, pool: DensePool) -> None:
        self._model, self._pool = model, pool

    def run(self, batch: Sequence[DecodeSequence]) -> Tensor:
        """Stores the KV of the newest tokens and returns the logits [batch, vocabulary] of the next ones."""
        spans, slots = [], []
        for row, sequence in enumerate(batch):
            stretches = tuple(self._pool.slots(sequence.runs, 0, sequence.length))
            spans.append(Span(row, 1, sequence.length - 1, stretches))
            slot, tokens = stretches[-1]
            slots.append(slot + tokens - 1)
        device = self._model.device
        return self._model.forward(
            torch.tensor([sequence.output[-1] for sequence in batch], device=device),
            torch.tensor([sequence.length - 1 for sequence in batch], device=device),
            torch.arange(len(batch), device=device),
            self._attend(spans, torch.tensor(slots, device=device)),
        )

    def _attend(self, spans: list[Span], slots_B: Tensor) -> Callable[[int, Tensor, Tensor, Tensor, float], Tensor]:
        pool, windows = self._pool, [layer.window for layer in self._model.layers]

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            keys, values = pool.keys[layer], pool.values[layer]
            keys.index_copy_(0, slots_B, k_THD)
            values.index_copy_(0, slots_B, v_THD)
            return ragged_attention(q_THD, keys, values, spans, scale, windows[layer])

        return attend
