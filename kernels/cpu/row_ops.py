"""What a transformer layer does to single rows beside its products, on a CPU in fp32, each in one pass over memory.

PyTorch takes several passes, and over a chunk of a prompt each of them reads and writes more than the caches hold.
Compiled by Numba, as `attention/decode.py` is. A row's result does not depend on the rows beside it.

Letters of tensor shapes: T tokens, H heads, D head dimension, N and I widths of rows.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..fast_paths import alike, fast_path, spread
from .compiled import compiled
from .numbers import exp_fp32
from .threads import in_parts

_WORK = 8  # products that one number, read and written, counts as (`threads.in_parts`)


def compiles(x: Tensor) -> bool:
    """Whether these functions work here and take the tensor: fp32 in one piece on a CPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() and has_row_ops()


def gated_silu(x_T2I: Tensor) -> Tensor:
    """silu of the first half of each row times the second: [..., 2 I] -> [..., I]."""
    rows = x_T2I.view(-1, x_T2I.shape[-1]).numpy()
    out = torch.empty(*x_T2I.shape[:-1], x_T2I.shape[-1] // 2)
    out_rows = out.view(-1, out.shape[-1]).numpy()
    in_parts(lambda first, end: silu_rows(rows, out_rows, first, end), len(rows), _WORK * rows.size)
    return out


def gated_silu_reference(x_T2I: Tensor) -> Tensor:
    """The same in PyTorch."""
    gate, up = x_T2I.chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """Each row over the root of its mean square, times `weight_N`; PyTorch's `F.rms_norm` is the reference."""
    rows, weight = x_TN.view(-1, x_TN.shape[-1]).numpy(), weight_N.numpy()
    out = torch.empty_like(x_TN)
    out_rows = out.view(rows.shape).numpy()
    in_parts(lambda first, end: norm_rows(rows, weight, eps, out_rows, first, end), len(rows), _WORK * rows.size)
    return out


def rotate_heads(x_THD: Tensor, heads: int, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotary embedding of the first `heads` heads, in place; the sine of the first half of D has its sign changed."""
    x, cos, sin = x_THD.numpy(), cos_TD.numpy(), sin_TD.numpy()
    in_parts(lambda first, end: rotate_rows(x, heads, cos, sin, first, end), len(x), _WORK * x.size)


def rotate_reference(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """All heads rotated, in PyTorch: a new tensor."""
    swapped_THD = x_THD.roll(x_THD.shape[-1] // 2, -1)
    return torch.addcmul(x_THD * cos_TD.unsqueeze(1), swapped_THD, sin_TD.unsqueeze(1))


@fast_path("compiled norm, activation and rotation")
def has_row_ops() -> bool:
    """The first call compiles them, or reads them from disk, so that no request waits for that."""
    x, weight, cos, sin = spread(3, 2, 34), spread(34) + 2, spread(3, 34), spread(3, 34) + 1
    wanted = torch.cat((rotate_reference(x[:, :1], cos, sin), x[:, 1:]), dim=1)
    rotated = x.clone()
    rotate_heads(rotated, 1, cos, sin)
    return (
        alike(gated_silu(x), gated_silu_reference(x))
        and alike(rms_norm(x, weight, 1e-6), F.rms_norm(x, (34,), weight, 1e-6))
        and alike(rotated, wanted)
    )


@compiled(fastmath=True, error_model="numpy")
def silu_rows(x: Any, out: Any, first: int, end: int) -> None:
    width = out.shape[1]
    for row in range(first, end):
        for i in range(width):
            gate = x[row, i]
            out[row, i] = gate / (np.float32(1) + exp_fp32(-gate)) * x[row, width + i]


@compiled(fastmath=True, error_model="numpy")
def norm_rows(x: Any, weight: Any, eps: float, out: Any, first: int, end: int) -> None:
    width = x.shape[1]
    for row in range(first, end):
        total = np.float32(0)
        for i in range(width):
            total += x[row, i] * x[row, i]
        factor = np.float32(1 / math.sqrt(total / width + eps))
        for i in range(width):
            out[row, i] = x[row, i] * factor * weight[i]


@compiled(fastmath=True)
def rotate_rows(x: Any, heads: int, cos: Any, sin: Any, first: int, end: int) -> None:
    half = x.shape[2] // 2
    for row in range(first, end):
        for head in range(heads):
            for d in range(half):
                low, high = x[row, head, d], x[row, head, half + d]
                x[row, head, d] = low * cos[row, d] + high * sin[row, d]
                x[row, head, half + d] = high * cos[row, half + d] + low * sin[row, half + d]
