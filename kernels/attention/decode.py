"""Attention of one new token for each of many sequences over a dense pool, on a CPU, in one call.

Compiled from Python when a worker starts (Numba; the result is kept on disk). A loop of PyTorch calls over the
sequences costs more than the attention itself; one batched PyTorch call needs all keys and values copied side by side.

Letters of tensor shapes: B sequences, S slots of the pool, H heads (query heads or KV heads, as named), D head
dimension, N keys of a query token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu.compiled import compiled
from ..cpu.numbers import exp_fp32, np_view, number
from ..cpu.threads import in_parts
from ..fast_paths import FastPath, alike, spread


@dataclass(frozen=True)
class SlotRanges:
    """Which slots of the pool hold the keys and values of each query token: token b has the ranges
    [bounds[b], bounds[b + 1])."""

    bounds: np.ndarray
    starts: np.ndarray  # first slot of each range
    lengths: np.ndarray
    longest: int  # slots of one query token, the most
    total: int  # slots of all query tokens

    @classmethod
    def of(cls, ranges: Sequence[Sequence[tuple[int, int]]]) -> "SlotRanges":
        """Of (first slot, tokens) ranges for each query token."""
        flat = np.array([one for of_token in ranges for one in of_token], dtype=np.int64).reshape(-1, 2)
        bounds = np.zeros(len(ranges) + 1, dtype=np.int64)
        np.cumsum([len(of_token) for of_token in ranges], out=bounds[1:])
        slots = np.add.reduceat(flat[:, 1], bounds[:-1])
        return cls(bounds, flat[:, 0].copy(), flat[:, 1].copy(), int(slots.max()), int(slots.sum()))


def decode_attention(q_BHD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, ranges: SlotRanges, scale: float) -> Tensor:
    """Each query token's attention over its slots: [B, query heads, D] in the dtype of `q_BHD`.

    fp32 or bf16 on a CPU, the same for all three; sums are fp32. A token's result does not depend on the others.
    """
    if has_decode_attention(q_BHD.dtype):
        return _compiled_attention(q_BHD, keys_SHD, values_SHD, ranges, scale)
    return decode_attention_reference(q_BHD, keys_SHD, values_SHD, ranges, scale)


def decode_attention_reference(
    q_BHD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, ranges: SlotRanges, scale: float
) -> Tensor:
    """The same in PyTorch, token by token, each with copies of its own keys and values, so that no token's result
    depends on the others or on which slots the pool has given it."""
    out_BHD = torch.empty_like(q_BHD)
    for row in range(len(q_BHD)):
        parts = range(ranges.bounds[row], ranges.bounds[row + 1])
        slots_N = torch.cat([torch.arange(n := int(ranges.starts[i]), n + int(ranges.lengths[i])) for i in parts])
        k_HND, v_HND = (x[slots_N].float().transpose(0, 1).contiguous() for x in (keys_SHD, values_SHD))
        q_HGD = q_BHD[row].float().view(len(k_HND), -1, q_BHD.shape[2])
        weight_HGN = (q_HGD @ k_HND.transpose(1, 2) * scale).softmax(-1)
        out_BHD[row] = (weight_HGN @ v_HND).view(q_BHD.shape[1:])
    return out_BHD


def _compiled_attention(
    q_BHD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, ranges: SlotRanges, scale: float
) -> Tensor:
    q = np_view(q_BHD.float().contiguous())
    out = np.empty_like(q)
    keys, values = np_view(keys_SHD), np_view(values_SHD)

    def run(first: int, end: int) -> None:
        scores = np.empty((q.shape[1] // keys.shape[1], ranges.longest), dtype=np.float32)
        _attend(q, keys, values, ranges.bounds, ranges.starts, ranges.lengths, out, scores, scale, first, end)

    in_parts(run, len(q), ranges.total * q.shape[1] * q.shape[2])
    return torch.from_numpy(out).to(q_BHD.dtype)


def has_decode_attention(dtype: torch.dtype) -> bool:
    """Whether it is compiled for queries, keys and values of that dtype. The first call compiles it, or reads it from
    disk, so that no request waits for that."""
    path = _COMPILED.get(dtype)
    return path is not None and path()


def _works(dtype: torch.dtype) -> bool:
    """Two query tokens, of two ranges and of one; 2 KV heads for 4 query heads."""
    inputs = spread(2, 4, 16, dtype=dtype), spread(9, 2, 16, dtype=dtype), spread(9, 2, 16, dtype=dtype) + 1
    ranges = SlotRanges.of([((0, 3), (5, 2)), ((2, 4),)])
    fast, plain = (f(*inputs, ranges, 0.5) for f in (_compiled_attention, decode_attention_reference))
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
    bounds: Any,
    starts: Any,
    lengths: Any,
    out: Any,
    scores: Any,
    scale: float,
    first: int,
    end: int,
) -> None:
    """Query tokens [first, end): scores of all their keys, their softmax, the weighted sum of values."""
    heads, dim = keys.shape[1], keys.shape[2]
    groups = q.shape[1] // heads
    factor = np.float32(scale)
    for row in range(first, end):
        for head in range(heads):
            place = 0
            for n in range(bounds[row], bounds[row + 1]):
                for slot in range(starts[n], starts[n] + lengths[n]):
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
            for n in range(bounds[row], bounds[row + 1]):
                for slot in range(starts[n], starts[n] + lengths[n]):
                    for g in range(groups):
                        weight = scores[g, place]
                        for d in range(dim):
                            out[row, head * groups + g, d] += weight * number(values[slot, head, d])
                    place += 1
