"""The two halves of a Llama layer, before and after its attention, each as one compiled function on one CPU thread.

Called one by one, a layer's dozen operations spend a fourth of a small step in Python and in waiting for its lock. Each
row's numbers are those of the operations that they are made of (`half_gemm.py`, `row_ops.py`), to the bit.

Letters of tensor shapes: T tokens, N width of the model, H heads, D head dimension; weights of products are the panels
of `half_gemm.pack_half`.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..fast_paths import fast_path, spread
from .compiled import compiled
from .half_gemm import Panels, half_matmul, has_half_tiles, pack_half
from .half_tile import BLOCK_ROWS, multiply_panels
from .row_ops import gated_silu, has_row_ops, norm_rows, rms_norm, rotate_heads, rotate_rows, silu_rows

Numbers = NDArray[np.float32]


def heads_of_rows(
    x_TN: Tensor, norm_N: Numbers, eps: float, qkv: Panels, heads: int, rotated: int, cos_TD: Tensor, sin_TD: Tensor
) -> Tensor:
    """RMSNorm, the product for q, k and v, and the rotation of the first `rotated` heads: fp32 [T, H, D]."""
    out_THD = torch.empty(x_TN.shape[0], heads, cos_TD.shape[1])
    _heads_of_rows(x_TN.numpy(), norm_N, eps, qkv, rotated, cos_TD.numpy(), sin_TD.numpy(), out_THD.numpy())
    return out_THD


def rows_after_attention(
    x_TN: Tensor, attended_THD: Tensor, norm_N: Numbers, eps: float, out: Panels, gate_up: Panels, down: Panels
) -> Tensor:
    """x + o(attended), and that + down(silu(gate) * up) of its RMSNorm: fp32 [T, N]."""
    out_TN = torch.empty_like(x_TN)
    attended = attended_THD.contiguous().numpy()
    _after_attention(x_TN.numpy(), attended, out, norm_N, eps, gate_up, down, out_TN.numpy())
    return out_TN


def has_layer_halves() -> bool:
    """Whether these functions are used here; the first call compiles them, or reads them from disk."""
    return has_half_tiles() and has_row_ops() and _halves()


@fast_path("layers in two compiled calls")
def _halves() -> bool:
    """Against the operations that they are made of, to the bit: 3 rows, 2 heads of 4."""
    x_TN, norm_N, cos_TD, sin_TD = spread(3, 8), spread(8) + 2, spread(3, 4), spread(3, 4) + 1
    square, wide, back = (pack_half(spread(*shape).half().float()) for shape in ((8, 8), (12, 8), (8, 6)))
    wanted_THD = half_matmul(rms_norm(x_TN, norm_N, 1e-6), square, 8).view(3, 2, 4)
    rotate_heads(wanted_THD, 1, cos_TD, sin_TD)
    heads_THD = heads_of_rows(x_TN, norm_N.numpy(), 1e-6, square, 2, 1, cos_TD, sin_TD)
    mixed_TN = x_TN + half_matmul(wanted_THD.view(3, 8), square, 8)
    both = half_matmul(rms_norm(mixed_TN, norm_N, 1e-6), wide, 12)
    out_TN = rows_after_attention(x_TN, wanted_THD, norm_N.numpy(), 1e-6, square, wide, back)
    return torch.equal(heads_THD, wanted_THD) and torch.equal(out_TN, mixed_TN + half_matmul(gated_silu(both), back, 8))


@compiled(error_model="numpy")
def _heads_of_rows(x: Any, norm: Any, eps: float, qkv: Any, rotated: int, cos: Any, sin: Any, out: Any) -> None:
    rows, width = x.shape
    out_rows = out.reshape(rows, out.shape[1] * out.shape[2])
    normed = np.empty((min(rows, BLOCK_ROWS), width), dtype=np.float32)
    for first in range(0, rows, BLOCK_ROWS):
        end = min(first + BLOCK_ROWS, rows)
        norm_rows(x[first:end], norm, eps, normed, 0, end - first)
        multiply_panels(normed[: end - first], qkv, out_rows[first:end], 0, len(qkv))
        rotate_rows(out, rotated, cos, sin, first, end)


@compiled(error_model="numpy")
def _after_attention(x: Any, heads: Any, o: Any, norm: Any, eps: float, gate_up: Any, down: Any, out: Any) -> None:
    rows, width = x.shape
    attended = heads.reshape(rows, heads.shape[1] * heads.shape[2])
    block, inner = min(rows, BLOCK_ROWS), down.shape[1]
    normed = np.empty((block, width), dtype=np.float32)
    both = np.empty((block, 2 * inner), dtype=np.float32)
    gated = np.empty((block, inner), dtype=np.float32)
    for first in range(0, rows, BLOCK_ROWS):
        end = min(first + BLOCK_ROWS, rows)
        size = end - first
        multiply_panels(attended[first:end], o, out[first:end], 0, len(o))
        _add(out[first:end], x[first:end])
        norm_rows(out[first:end], norm, eps, normed, 0, size)
        multiply_panels(normed[:size], gate_up, both[:size], 0, len(gate_up))
        silu_rows(both, gated, 0, size)
        multiply_panels(gated[:size], down, normed[:size], 0, len(down))
        _add(out[first:end], normed[:size])


@compiled()
def _add(x: Any, more: Any) -> None:
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[row, i] += more[row, i]
