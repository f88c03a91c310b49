"""Attention of one new token for each of many sequences over a dense pool, on a CPU, in one call.

Compiled from Python when a worker starts (Numba; the result is kept on disk). A loop of PyTorch calls over the
sequences costs more than the attention itself; one batched PyTorch call needs all keys and values copied side by side.

Letters of tensor shapes: B sequences, S slots of the pool, H heads (query heads or KV heads, as named), D head
dimension, N stretches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu.compiled import compiled
from ..cpu.exponential import exp_fp32
from ..cpu.numbers import np_view, number
from ..cpu.threads import in_parts
from ..fast_paths import FastPath, alike, spread


@dataclass(frozen=True)
class Stretches:
    """Where the keys of each row lie: row b has the stretches [of[b], of[b + 1])."""

    of: np.ndarray
    slots: np.ndarray  # first slot of each stretch
    tokens: np.ndarray
    most: int  # tokens of one row
    total: int  # tokens of all rows

    @classmethod
    def gather(cls, rows: Sequence[Sequence[tuple[int, int]]]) -> "Stretches":
        """Of (first slot, tokens) stretches for each row."""
        flat = np.array([stretch for row in rows for stretch in row], dtype=np.int64).reshape(-1, 2)
        of = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=of[1:])
        lengths = np.add.reduceat(flat[:, 1], of[:-1])
        return cls(of, flat[:, 0].copy(), flat[:, 1].copy(), int(lengths.max()), int(lengths.sum()))


def decode_attention(q_BHD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, stretches: Stretches, scale: float) -> Tensor:
    """Each row's attention over all tokens of its stretches: [B, query heads, D] in the dtype of `q_BHD`.

    fp32 or bf16 on a CPU, the same for all three; sums are fp32. A row's result does not depend on the other rows.
    """
    if has_decode_attention(q_BHD.dtype):
        return _compiled_attention(q_BHD, keys_SHD, values_SHD, stretches, scale)
    return decode_attention_reference(q_BHD, keys_SHD, values_SHD, stretches, scale)


def decode_attention_reference(
    q_BHD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, stretches: Stretches, scale: float
) -> Tensor:
    """The same in PyTorch, row by row, each with copies of its own keys and values, so that no row's result depends on
    the others or on where the pool holds it."""
    out_BHD = torch.empty_like(q_BHD)
    for row in range(len(q_BHD)):
        parts = range(stretches.of[row], stretches.of[row + 1])
        slots_N = torch.cat([torch.arange(n := int(stretches.slots[i]), n + int(stretches.tokens[i])) for i in parts])
        k_HND, v_HND = (x[slots_N].float().transpose(0, 1).contiguous() for x in (keys_SHD, values_SHD))
        q_HGD = q_BHD[row].float().view(len(k_HND), -1, q_BHD.shape[2])
        weight_HGN = (q_HGD @ k_HND.transpose(1, 2) * scale).softmax(-1)
        out_BHD[row] = (weight_HGN @ v_HND).view(q_BHD.shape[1:])
    return out_BHD


def _compiled_attention(
    q_BHD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, stretches: Stretches, scale: float
) -> Tensor:
    q = np_view(q_BHD.float().contiguous())
    out = np.empty_like(q)
    keys, values = np_view(keys_SHD), np_view(values_SHD)

    def run(first: int, end: int) -> None:
        scores = np.empty((q.shape[1] // keys.shape[1], stretches.most), dtype=np.float32)
        _attend(q, keys, values, stretches.of, stretches.slots, stretches.tokens, out, scores, scale, first, end)

    in_parts(run, len(q), stretches.total * q.shape[1] * q.shape[2])
    return torch.from_numpy(out).to(q_BHD.dtype)


def has_decode_attention(dtype: torch.dtype) -> bool:
    """Whether it is compiled for queries, keys and values of that dtype. The first call compiles it, or reads it from
    disk, so that no request waits for that."""
    path = _COMPILED.get(dtype)
    return path is not None and path()


def _works(dtype: torch.dtype) -> bool:
    """Two rows of two stretches and of one; 2 KV heads for 4 query heads."""
    inputs = spread(2, 4, 16, dtype=dtype), spread(9, 2, 16, dtype=dtype), spread(9, 2, 16, dtype=dtype) + 1
    stretches = Stretches.gather([((0, 3), (5, 2)), ((2, 4),)])
    fast, plain = (f(*inputs, stretches, 0.5) for f in (_compiled_attention, decode_attention_reference))
    return alike(fast, plain, 1e-5 if dtype == torch.float32 else 1e-2)


_COMPILED = {
    dtype: FastPath(f"compiled attention of {name} tokens", partial(_works, dtype))
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}


@compiled(fastmath=True, error_model="numpy")
def _attend(
    q: Any,
    keys: Any,
    values: Any,
    of: Any,
    slots: Any,
    tokens: Any,
    out: Any,
    scores: Any,
    scale: float,
    first: int,
    end: int,
) -> None:
    """Rows [first, end): scores of all tokens, their softmax, the weighted sum of values."""
    heads, dim = keys.shape[1], keys.shape[2]
    groups = q.shape[1] // heads
    factor = np.float32(scale)
    for row in range(first, end):
        for head in range(heads):
            place = 0
            for n in range(of[row], of[row + 1]):
                for slot in range(slots[n], slots[n] + tokens[n]):
                    for g in range(groups):
                        total = np.float32(0)
                        for d in range(dim):
                            total += q[row, head * groups + g, d] * number(keys[slot, head, d])
                        scores[g, place] = total * factor
                    place += 1
            for g in range(groups):
                greatest = scores[g, 0]
                for t in range(place):
                    greatest = max(greatest, scores[g, t])
                total = np.float32(0)
                for t in range(place):
                    weight = exp_fp32(scores[g, t] - greatest)
                    scores[g, t] = weight
                    total += weight
                inverse = np.float32(1) / total
                for t in range(place):
                    scores[g, t] *= inverse
                for d in range(dim):
                    out[row, head * groups + g, d] = np.float32(0)
            place = 0
            for n in range(of[row], of[row + 1]):
                for slot in range(slots[n], slots[n] + tokens[n]):
                    for g in range(groups):
                        weight = scores[g, place]
                        for d in range(dim):
                            out[row, head * groups + g, d] += weight * number(values[slot, head, d])
                    place += 1
