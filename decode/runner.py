"""Steps a batch: one new token for each sequence in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.model import Model
from .sequence import DecodeSequence
from .store import KvStore


class DecodeRunner:
    """One forward pass over the newest token of each sequence. The engine thread alone uses it."""

    def __init__(self, model: Model, store: KvStore) -> None:
        self._model, self._store = model, store

    def run(self, batch: Sequence[DecodeSequence]) -> Tensor:
        """Stores the KV of the newest tokens and returns the logits [batch, vocabulary] of the next ones."""
        device = self._model.device
        return self._model.forward(
            torch.tensor([sequence.output[-1] for sequence in batch], device=device),
            torch.tensor([sequence.length - 1 for sequence in batch], device=device),
            torch.arange(len(batch), device=device),
            self._store.begin_step(batch),
        )
