"""Packing on a CPU, compiled: `reference.py`'s arithmetic in fp32, a head of a page at a time, which a core's cache
holds.

Sums are rounded otherwise than in `reference.py`, so that a number within rounding of the border between two codes may
get the other one; sums of whole numbers are exact in both. A page's bytes never depend on the pages that come with it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu.compiled import compiled
from ..cpu.numbers import bf16_bits, np_view, number, scale16_bits
from ..cpu.threads import in_parts
from .codebook import magnitude_steps, unit
from .layout import PageLayout
from .reference import pack_reference
from .rotation import Rotations, paley_factor
from .tiles import FAST, U, rotate, to_centroids, to_codes, transpose

# Of norms: outside of this, squares and sums of fp32 could overflow or lose bits.
_MIN, _MAX = np.float32(2.0**-48), np.float32(2.0**48)


def pack_cpu(k_THD: Tensor, v_THD: Tensor, rotations: Rotations, layout: PageLayout) -> Tensor:
    """`pack_reference` for tensors on a CPU; it does the pages with extreme numbers, vectors of zeros or NaN."""
    page, dim, heads = layout.page_tokens, layout.head_dim, k_THD.shape[1]
    pages = k_THD.shape[0] // page
    make = torch.zeros if layout.has_padding else torch.empty
    out_NB = make(pages, heads * layout.head_bytes, dtype=torch.uint8)
    out, unsafe = out_NB.view(-1).numpy(), np.zeros(pages, dtype=np.uint8)
    paley = paley_factor(dim).numpy()
    kinds: list[Callable[..., None]] = []
    for keys, x, bits in ((True, k_THD, layout.key_bits), (False, v_THD, layout.value_bits)):
        x = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
        weight = rotations.key_weight_HD if keys else rotations.value_weight_D.expand(heads, dim).contiguous()
        steps = np.array(magnitude_steps(bits), dtype=np.int8)
        codes, scale = (0, layout.scale_key) if keys else (layout.codes_value, layout.scale_value)
        places = (layout.head_bytes, codes, scale, layout.mean_key)
        flat = np_view(x.contiguous().view(-1))
        kinds.append(partial(_pack, flat, weight.numpy(), keys, bits, steps, unit(bits), places))

    def run(first: int, end: int) -> None:
        for kind in kinds:
            kind(paley, page, out, unsafe, first, end)

    in_parts(run, pages, 2 * k_THD.numel())
    if unsafe.any():
        again = torch.from_numpy(unsafe.astype(bool))
        tokens = again.repeat_interleave(page)
        out_NB[again] = pack_reference(k_THD[tokens], v_THD[tokens], rotations, layout)
    return out_NB


@compiled(error_model="numpy")
def _pack(
    x: Any,
    weight: Any,
    keys: bool,
    bits: int,
    steps: Any,
    unit: float,
    places: tuple[int, int, int, int],
    paley: Any,
    page: int,
    out: Any,
    unsafe: Any,
    first: int,
    end: int,
) -> None:
    """The keys or the values of pages [first, end), flat, into their places in `out`: the bytes of a head, and within
    them of the codes, scales and means."""
    heads, dim = weight.shape
    tile, spare = np.empty(dim * page, dtype=np.float32), np.empty(dim * page, dtype=np.float32)
    grid, codes = np.empty(dim * page, dtype=np.int8), np.empty(dim * page, dtype=np.uint8)
    joined, norm = np.empty(dim * page // 2, dtype=np.uint8), np.empty(page, dtype=np.float32)
    for n in range(first, end):
        for head in range(heads):
            one = U((n * heads + head) * places[0])
            _load(x, U((n * page * heads + head) * dim), U(heads * dim), weight, U(head), spare)
            transpose(spare, U(0), U(page), U(dim), tile, U(0), U(page))
            rotate(tile, page, paley, spare)
            if keys:
                _center(tile, U(dim), out, one + U(places[3]))
            _norms(tile, norm)
            for t in range(page):
                unsafe[n] |= not (norm[t] >= _MIN and norm[t] <= _MAX)
            _floors(tile, norm, np.float32(unit), grid)
            to_codes(grid, steps, 1 << (bits - 1), codes)
            to_centroids(codes, steps, 1 << (bits - 1), grid)
            _scales(grid, norm, out, one + U(places[2]))
            _join(codes, U(page), keys, bits, joined, out, one + U(places[1]))


@compiled(error_model="numpy", fastmath=FAST)
def _load(x: Any, start: Any, stride: Any, weight: Any, head: Any, dense: Any) -> None:
    """dense [T, D] = x · weight, of rows of x that lie `stride` numbers apart."""
    dim = U(weight.shape[1])
    for t in range(U(0), U(len(dense)) // dim):
        for c in range(U(0), dim):
            dense[t * dim + c] = number(x[start + t * stride + c]) * weight[head, c]


@compiled(error_model="numpy", fastmath=FAST)
def _center(tile: Any, dim: Any, out: Any, start: Any) -> None:
    """Takes the mean out of each row, as it is stored, in bf16 and without the tile's factor sqrt(d)."""
    tokens, root = U(len(tile)) // dim, np.sqrt(np.float32(dim))
    for c in range(U(0), dim):
        total = np.float32(0)
        for i in range(c * tokens, (c + U(1)) * tokens):
            total += tile[i]
        bits = bf16_bits(total / np.float32(tokens) / root)
        middle = number(bits) * root
        for i in range(c * tokens, (c + U(1)) * tokens):
            tile[i] -= middle
        out[start + U(2) * c], out[start + U(2) * c + U(1)] = np.uint8(bits), np.uint8(bits >> np.uint16(8))


@compiled(error_model="numpy", fastmath=FAST)
def _norms(tile: Any, norm: Any) -> None:
    """Norms of the columns, without the tile's factor sqrt(d)."""
    tokens = U(len(norm))
    root = np.sqrt(np.float32(U(len(tile)) // tokens))
    norm[:] = 0
    for start in range(U(0), U(len(tile)), tokens):
        for t in range(U(0), tokens):
            norm[t] += tile[start + t] * tile[start + t]
    for t in range(U(0), tokens):
        norm[t] = np.sqrt(norm[t]) / root


@compiled(error_model="numpy", fastmath=FAST)
def _floors(tile: Any, norm: Any, unit: Any, grid: Any) -> None:
    """grid = floor(tile · unit / norm of the column), within ±126."""
    tokens = U(len(norm))
    gain = unit / norm
    for start in range(U(0), U(len(tile)), tokens):
        for t in range(U(0), tokens):
            x = np.floor(tile[start + t] * gain[t])
            grid[start + t] = np.int8(np.int32(max(min(x, np.float32(126)), np.float32(-126))))


@compiled(error_model="numpy")
def _scales(centroids: Any, norm: Any, out: Any, start: Any) -> None:
    """Stores the norms over those of the centroids."""
    tokens = U(len(norm))
    squares = np.zeros(len(norm), dtype=np.int32)
    for row in range(U(0), U(len(centroids)), tokens):
        for t in range(U(0), tokens):
            squares[t] += np.int32(centroids[row + t]) * np.int32(centroids[row + t])
    for t in range(U(0), tokens):
        bits = scale16_bits(norm[t] / np.sqrt(np.float32(squares[t])))
        out[start + U(2) * t], out[start + U(2) * t + U(1)] = np.uint8(bits), np.uint8(bits >> np.uint16(8))


@compiled()
def _join(codes: Any, page: Any, keys: bool, bits: int, joined: Any, out: Any, start: Any) -> None:
    """Codes, which are overwritten, into the bytes of their section."""
    size = U(len(codes))
    # Codes that share a byte lie `width` apart: in the rows of values, in the whole tile of keys.
    row = size if keys else page
    width = row >> U(1) if bits == 4 else row >> U(2)
    for a in range(U(0), size, row):
        b, c, d, to = a + width, a + U(2) * width, a + U(3) * width, a // row * width
        if bits == 4:
            for i in range(U(0), width):
                joined[to + i] = codes[a + i] | codes[b + i] << np.uint8(4)
        else:
            for i in range(U(0), width):
                low = (codes[a + i] & 3) | (codes[b + i] & 3) << 2
                joined[to + i] = low | (codes[c + i] & 3) << 4 | (codes[d + i] & 3) << 6
    _put(joined, size // row * width, page, keys, out, start)
    if bits != 3:
        return
    half = width >> U(1)
    for a in range(U(0), size, row):
        b, c, d, to = a + width, a + U(2) * width, a + U(3) * width, a // row * half
        for i in range(U(0), width):
            low = codes[a + i] >> 2 | (codes[b + i] >> 2) << 1
            codes[a + i] = low | (codes[c + i] >> 2) << 2 | (codes[d + i] >> 2) << 3
        for i in range(U(0), half):
            joined[to + i] = codes[a + i] | codes[a + half + i] << 4
    _put(joined, size // row * half, page, keys, out, start + size // row * width)


@compiled()
def _put(joined: Any, size: Any, page: Any, keys: bool, out: Any, start: Any) -> None:
    if keys:
        transpose(joined, U(0), size // page, page, out, start, size // page)
    else:
        for i in range(U(0), size):
            out[start + i] = joined[i]
