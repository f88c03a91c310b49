"""Biases that a request adds to the logits of some tokens.

Letters of tensor shapes: R rows, V vocabulary, N tokens of all rows, one after the other.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..proto.sampling import Sampling


def add_biases(logits_RV: Tensor, rows: Sequence[tuple[int, Sampling]]) -> None:
    """Adds the biases of some rows (index, options), in place and in one pass; their tokens are in the vocabulary."""
    vocabulary = logits_RV.shape[1]
    arrays = [(index, *map(np.asarray, sampling.bias_arrays)) for index, sampling in rows]
    place_N = torch.from_numpy(np.concatenate([tokens + index * vocabulary for index, tokens, _ in arrays]))
    bias_N = torch.from_numpy(np.concatenate([biases for _, _, biases in arrays]))
    logits_RV.view(-1).index_add_(0, place_N.to(logits_RV.device), bias_N.to(logits_RV.device, logits_RV.dtype))
