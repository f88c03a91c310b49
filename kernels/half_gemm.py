"""Products of fp32 rows with fp16 weights on a CPU, compiled by Numba.

Weights lie in panels: all terms of COLUMNS outputs in one piece, so that a small batch streams through them once. Rows
go through a panel in tiles (`half_tile.py`) while it lies in the cache; of many rows a block at a time, for which the
inputs stay in the cache too.

Letters of tensor shapes: T rows, I inputs, O outputs, P panels, C columns of a panel.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from .half_tile import COLUMNS, MOST_ROWS, half_tile, has_half_tiles
from .huge_pages import zeros_in_huge_pages
from .threads import in_parts

_BLOCK_ROWS = 140  # ten full tiles; half as many read the weights too often, more leave the cache

Panels = NDArray[np.uint16]  # bits of fp16, [P, I, C]

__all__ = ["compile_half_gemm", "half_matmul", "has_half_tiles", "pack_half"]


def pack_half(weight_OI: Tensor) -> Panels:
    """The panels of a weight that fp16 holds, with zeros for outputs that fill the last panel."""
    outputs, inputs = weight_OI.shape
    panels = -(-outputs // COLUMNS)
    packed_PIC = zeros_in_huge_pages(panels, inputs, COLUMNS, dtype=torch.float16)
    for panel in range(panels):  # one at a time: a copy of the whole would be as large as the weight
        columns_CI = weight_OI[panel * COLUMNS : (panel + 1) * COLUMNS]
        packed_PIC[panel, :, : len(columns_CI)] = columns_CI.T
    return packed_PIC.view(torch.uint16).numpy()


def half_matmul(x_TI: Tensor, packed_PIC: Panels, outputs: int) -> Tensor:
    """x times the weight of so many outputs that was packed, fp32 [T, O]; sums are fp32, in the order of the inputs."""
    x, out_TO = x_TI.contiguous().numpy(), torch.empty(len(x_TI), outputs)
    out = out_TO.numpy()
    in_parts(lambda first, end: _multiply(x, packed_PIC, out, first, end), len(packed_PIC), out.size * x.shape[1])
    return out_TO


def compile_half_gemm() -> None:
    """Compiles it, or reads it from disk, so that no request waits for that."""
    if has_half_tiles():
        half_matmul(torch.ones(1, 1), pack_half(torch.ones(1, 1)), 1)


@njit(nogil=True, cache=True)
def _multiply(x: Any, packed: Any, out: Any, first: int, end: int) -> None:
    """The outputs of panels [first, end)."""
    rows, terms = x.shape
    outputs = out.shape[1]
    spare = np.empty(MOST_ROWS * COLUMNS, dtype=np.float32)  # where the last panel has more columns than outputs
    xs, weights, outs = x.ctypes.data, packed.ctypes.data, out.ctypes.data
    for block in range(0, rows, _BLOCK_ROWS):
        size = min(_BLOCK_ROWS, rows - block)
        tiles = (size + MOST_ROWS - 1) // MOST_ROWS
        for panel in range(first, end):
            whole = (panel + 1) * COLUMNS <= outputs
            panel_at = weights + np.uint64(2 * panel * terms * COLUMNS)
            for tile in range(tiles):
                row, count = block + size * tile // tiles, size * (tile + 1) // tiles - size * tile // tiles
                x_at = xs + np.uint64(4 * row * terms)
                if whole:
                    place = outs + np.uint64(4 * (row * outputs + panel * COLUMNS))
                    half_tile(x_at, panel_at, place, count, terms, outputs)
                    continue
                half_tile(x_at, panel_at, spare.ctypes.data, count, terms, COLUMNS)
                for r in range(count):
                    for column in range(panel * COLUMNS, outputs):
                        out[row + r, column] = spare[r * COLUMNS + column - panel * COLUMNS]
