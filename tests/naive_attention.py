"""Attention as it is defined, over a KV cache made of lists: what exactness is measured against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.kernels.shapes import LayerShape


class NaiveCache:
    """Keys and values of several sequences, and attention over them for a ragged batch of new tokens."""

    def __init__(self, layers: Sequence[LayerShape], sequences: int) -> None:
        self._layers = layers
        self._kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._sequences = range(sequences)
        self.calls: list[int] = []  # layers, in the order in which they asked

    def attend_for(self, sequence_T: Tensor, position_T: Tensor):
        """The callback for a batch whose row t is token `position_T[t]` of sequence `sequence_T[t]`.

        Rows of one sequence follow each other in the order of their positions, at any place in the batch.
        """

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            self.calls.append(layer)
            out_THD = torch.empty_like(q_THD)
            for sequence in self._sequences:
                rows = (sequence_T == sequence).nonzero()[:, 0]
                if len(rows):
                    out_THD[rows] = self._one(
                        layer, sequence, q_THD[rows], k_THD[rows], v_THD[rows], position_T[rows], scale
                    )
            return out_THD

        return attend

    def _one(
        self, layer: int, sequence: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float
    ) -> Tensor:
        before = self._kv.get((layer, sequence))
        if before is not None:
            k, v = torch.cat((before[0], k)), torch.cat((before[1], v))
        self._kv[layer, sequence] = k, v
        seen = torch.arange(len(k))[None] <= positions[:, None]
        if (window := self._layers[layer].window) is not None:
            seen &= torch.arange(len(k))[None] > positions[:, None] - window
        group = q.shape[1] // k.shape[1]
        score = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * scale
        weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weight, v.repeat_interleave(group, 1))
