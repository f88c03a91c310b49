"""Calibration of the balance: which key channels the queries care about.

The codec's error is spread evenly over the channels of the balanced keys k / b, so that the variance of the error of a
score is proportional to sum (b_c q_c)² · sum (k_c / b_c)², k taken from its page's mean. The product is least at

    b_c = (E[(k - mean)_c²] / E[q_c²])^(1/4),

q over the query heads of the group. Only ratios between channels matter: b is scaled to geometric mean 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.shapes import LayerShape

_FLOOR = 1e-6  # of the mean: a channel that was silent in the text must not get all or none of the precision


class Moments:
    """Second moments of keys and queries, by layer; feed it from an `attend` callback, then take `balance`."""

    def __init__(self, layers: Sequence[LayerShape], page_tokens: int) -> None:
        self._page = page_tokens
        self._keys = [torch.zeros(s.kv_heads, s.head_dim, dtype=torch.float64) for s in layers]
        self._queries = [torch.zeros_like(k) for k in self._keys]

    def add(self, layer: int, q_THD: Tensor, k_THD: Tensor) -> None:
        """Queries [T, query heads, D] and keys [T, KV heads, D] of one sequence from its first token on.

        The first page is left out (it is never packed, and its first tokens are unlike all others), and so is what
        does not fill a page.
        """
        end = k_THD.shape[0] // self._page * self._page
        if end <= self._page:
            return
        heads, dim = self._keys[layer].shape
        k = k_THD[self._page : end].double().view(-1, self._page, heads, dim)
        q = q_THD[self._page : end].double().view(-1, heads, q_THD.shape[1] // heads, dim)
        self._keys[layer] += (k - k.mean(1, keepdim=True)).square().sum((0, 1)).cpu()
        self._queries[layer] += q.square().sum((0, 2)).cpu()

    def balance(self) -> list[Tensor]:
        """For each layer float32 [KV heads, D], geometric mean 1; all ones for layers that saw nothing."""
        return [_balance(k, q) for k, q in zip(self._keys, self._queries, strict=True)]


def _balance(keys_HD: Tensor, queries_HD: Tensor) -> Tensor:
    ratio = _floored(keys_HD) / _floored(queries_HD)
    log = ratio.log() / 4
    return (log - log.mean(1, keepdim=True)).exp().float()


def _floored(moment_HD: Tensor) -> Tensor:
    mean = moment_HD.mean(1, keepdim=True)
    return torch.where(mean > 0, torch.maximum(moment_HD, mean * _FLOOR), torch.ones_like(moment_HD))
