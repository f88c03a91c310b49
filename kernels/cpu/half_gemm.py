"""Products of fp32 rows with fp16 weights on a CPU, compiled by Numba.

Weights lie in panels: all terms of COLUMNS outputs in one piece, so that a small batch streams through them once. Rows
go through a panel in tiles (`half_tile.py`) while it lies in the cache; of many rows a block at a time, for which the
inputs stay in the cache too.

Letters of tensor shapes: T rows, I inputs, O outputs, P panels, C columns of a panel.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..fast_paths import alike, fast_path, spread
from .half_tile import COLUMNS, MOST_ROWS, may_compile, multiply_panels
from .huge_pages import zeros_in_huge_pages
from .threads import in_parts

Panels = NDArray[np.uint16]  # bits of fp16, [P, I, C]


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
    panels, inputs, columns = packed_PIC.shape
    assert x_TI.dtype == torch.float32 and x_TI.shape[1] == inputs and outputs <= panels * columns, "not of this weight"
    x, out_TO = x_TI.contiguous().numpy(), torch.empty(len(x_TI), outputs)
    out = out_TO.numpy()
    in_parts(lambda first, end: multiply_panels(x, packed_PIC, out, first, end), panels, out.size * inputs)
    return out_TO


@fast_path("products with fp16 weights")
def _half_products() -> bool:
    """A full tile, one that is not, and a panel with more columns than outputs."""
    x_TI, weight_OI = spread(MOST_ROWS + 1, 5), spread(COLUMNS + 1, 5).half().float()
    return alike(half_matmul(x_TI, pack_half(weight_OI), len(weight_OI)), x_TI @ weight_OI.T)


def has_half_tiles() -> bool:
    """Whether `half_matmul` is used here. The first call compiles it, or reads it from disk, and tries it."""
    return may_compile() and _half_products()
