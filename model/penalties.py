"""Penalties for tokens that were seen before: repetition, presence, frequency; and biases that a request asks for.

What a request has seen is counted once and then token by token, so that a step costs it one look-up and not its whole
length in Python; all requests of a batch are changed in one pass.

Letters of tensor shapes: R rows, V vocabulary, N distinct tokens of all rows, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..proto.sampling import Sampling


class SeenTokens:
    """The distinct tokens of one request, and how often each stands in its output.

    Those of its prompt are there where the options have use for them. One thread at a time.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        first = list(dict.fromkeys(prompt)) if sampling.repetition_penalty != 1 else []
        self._place = {token: place for place, token in enumerate(first)}
        self._tokens = np.array(first, dtype=np.int64)
        self._counts = np.zeros(len(first), dtype=np.float32)
        self._read = 0  # tokens of the output that are counted

    def count(self, output: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [N] and how often each is in `output`, which goes on from what it was at the last call."""
        for token in output[self._read :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._tokens):
                grown = max(64, 2 * place)
                self._tokens, self._counts = (_longer(array, grown) for array in (self._tokens, self._counts))
            self._tokens[place] = token
            self._counts[place] += 1
        self._read = len(output)
        return self._tokens[: len(self._place)], self._counts[: len(self._place)]


@dataclass(frozen=True, slots=True)
class PenalisedRow:
    """A row of logits whose options penalise tokens."""

    index: int
    sampling: Sampling
    seen: SeenTokens
    output_token_ids: Sequence[int]


def penalises(sampling: Sampling) -> bool:
    """Whether the options change the logits of tokens that were seen."""
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def penalise(logits_RV: Tensor, rows: Sequence[PenalisedRow]) -> None:
    """Changes the logits of some rows, in place and in their dtype: repetition first, then presence and frequency."""
    counted = [row.seen.count(row.output_token_ids) for row in rows]
    sizes = [len(tokens) for tokens, _ in counted]
    if not any(sizes):
        return
    vocabulary, device = logits_RV.shape[1], logits_RV.device
    flat_N = np.concatenate([tokens + row.index * vocabulary for (tokens, _), row in zip(counted, rows, strict=True)])
    columns = np.array(
        [(s.repetition_penalty, s.presence_penalty, s.frequency_penalty) for s in (row.sampling for row in rows)],
        dtype=np.float64 if logits_RV.dtype == torch.float64 else np.float32,
    )
    repetition, presence, frequency = np.repeat(columns, sizes, axis=0).T
    count = np.concatenate([counts for _, counts in counted])
    once = np.where(count > 0, presence + frequency * count, columns.dtype.type(0))
    place_N, factor_N, once_N = (torch.from_numpy(array).to(device) for array in (flat_N, repetition.copy(), once))
    logits = logits_RV.view(-1)
    value_N = logits[place_N]
    logits[place_N] = torch.where(value_N > 0, value_N / factor_N, value_N * factor_N) - once_N


def add_biases(logits_RV: Tensor, rows: Sequence[tuple[int, Sampling]]) -> None:
    """Adds the biases of some rows (index, options), in place and in one pass; their tokens are in the vocabulary."""
    vocabulary = logits_RV.shape[1]
    arrays = [(index, *map(np.asarray, sampling.bias_arrays)) for index, sampling in rows]
    place_N = torch.from_numpy(np.concatenate([tokens + index * vocabulary for index, tokens, _ in arrays]))
    bias_N = torch.from_numpy(np.concatenate([biases for _, _, biases in arrays]))
    logits_RV.view(-1).index_add_(0, place_N.to(logits_RV.device), bias_N.to(logits_RV.device, logits_RV.dtype))


def _longer(array: np.ndarray, size: int) -> np.ndarray:
    grown = np.zeros(size, dtype=array.dtype)
    grown[: len(array)] = array
    return grown
