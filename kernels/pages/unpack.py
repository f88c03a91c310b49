"""Packed pages -> dense keys and values (layout: `layout.py`; the inverse of `pack.py`).

    key   = gain · (scale · Hᵀ centroids + Hᵀ mean)
    value = gain · scale · Hᵀ centroids

Hᵀ centroids are sums of 8-bit integers, and exact. Values outside of the range of the wanted dtype become its largest
or smallest finite value.
"""

from functools import cache

import torch
from torch import Tensor

from ..cpu.int8_product import int8_product
from ..rotation import hadamard
from ..scale16 import from_scale16
from ..scratch import scratch, space
from .codebook import quad_table
from .layout import PageLayout
from .pack import Rotations, chunks, read_words

LARGE = 1e30  # scales and means over this may overflow fp32 on the way: float64


class _Space:
    """Scratch tensors for the keys of some pages, and after them for their values."""

    def __init__(self, pages: int, heads: int, layout: PageLayout, device: torch.device) -> None:
        page, dim = layout.page_tokens, layout.head_dim
        rows = pages * heads * page
        self.index = scratch("index", (rows * dim // 4,), torch.int32, device)
        self.index_keys = self.index.view(pages, heads, page, dim // 4)
        # Values: dimensions first, for one matrix whose columns are the tokens of all pages and heads.
        self.index_values = self.index.view(dim, pages, heads, page // 4).permute(1, 2, 0, 3)
        self.found = scratch("found", (rows * dim // 4,), torch.int32, device)
        centroids = self.found.view(torch.int8)
        self.centroids_keys, self.centroids_values = centroids.view(rows, dim), centroids.view(dim, rows).T
        self.sums = scratch("sums", (rows, dim), torch.int32, device)
        self.sums_pages = self.sums.view(pages, heads, page, dim)
        self.floats = scratch("y", (pages, heads, page, dim), torch.float32, device)
        self.key_table = quad_table(layout.key_bits).to(device)
        self.value_table = quad_table(layout.value_bits).to(device)
        self.key_matrix = hadamard(dim)[column_order(dim, layout.key_bits)].to(device=device, dtype=torch.int8)

    def floats_of(self, dtype: torch.dtype) -> Tensor:
        """The sums as float32 or float64 [pages, H, P, D]."""
        return self.floats.copy_(self.sums_pages) if dtype == torch.float32 else self.sums_pages.to(dtype)


def unpack_reference(
    packed_PB: Tensor, rotations: Rotations, layout: PageLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H, D] of packed pages uint8 [pages, H * head_bytes]."""
    pages = packed_PB.shape[0]
    heads, dim, page = rotations.key_gain_HD.shape[0], layout.head_dim, layout.page_tokens
    k_PTHD = torch.empty(pages, page, heads, dim, dtype=dtype, device=packed_PB.device)
    v_PTHD = torch.empty_like(k_PTHD)
    if pages == 0:
        return k_PTHD.flatten(0, 1), v_PTHD.flatten(0, 1)
    packed_PHB = packed_PB.view(pages, heads, layout.head_bytes)
    scales = from_scale16(_section(packed_PHB, layout.scale_key, 4 * page).view(torch.int16))
    scale_key, scale_value = scales[..., :page, None], scales[..., page:]
    # In the order in which the codes of values are looked up.
    scale_value = (scale_value[..., column_order(page, layout.value_bits), None]).mul_(dim**-0.5)
    mean = _section(packed_PHB, layout.mean_key, 2 * dim).view(torch.bfloat16).float()
    largest = max(x.abs().item() for x in (scales.amax(), *mean.aminmax()))
    gain, matrix = rotations.key_gain_HD[:, None], hadamard(dim).to(mean.device)
    if largest > LARGE:
        scale_key, scale_value, mean, gain, matrix = (x.double() for x in (scale_key, scale_value, mean, gain, matrix))
    mean = (mean @ matrix)[:, :, None]
    limit = torch.finfo(dtype).max
    limit = limit if largest > min(LARGE, limit / 4096 / dim) else None
    for start, end in chunks(pages * page, page, heads * dim):
        rows = slice(start // page, end // page)
        one = space(_Space, rows.stop - rows.start, heads, layout, packed_PB.device)
        _unpack_keys(packed_PHB[rows], layout, one, (scale_key[rows], mean[rows], gain), limit, k_PTHD[rows])
        _unpack_values(packed_PHB[rows], layout, one, scale_value[rows], rotations, limit, v_PTHD[rows])
    return k_PTHD.flatten(0, 1), v_PTHD.flatten(0, 1)


def _unpack_keys(
    packed_PHB: Tensor,
    layout: PageLayout,
    one: _Space,
    affine: tuple[Tensor, Tensor, Tensor],
    limit: float | None,
    out_PTHD: Tensor,
) -> None:
    _index(packed_PHB[:, :, : layout.code_bytes_key], layout.page_tokens, layout.key_bits, one.index_keys)
    torch.index_select(one.key_table, 0, one.index, out=one.found)
    int8_product(one.centroids_keys, one.key_matrix, one.sums)
    scale, mean, gain = affine
    x_PHTD = one.floats_of(scale.dtype)
    torch.addcmul(mean, x_PHTD, scale, out=x_PHTD).mul_(gain)
    if limit is not None:
        x_PHTD.clamp_(-limit, limit)
    out_PTHD.copy_(x_PHTD.transpose(1, 2))


def _unpack_values(
    packed_PHB: Tensor,
    layout: PageLayout,
    one: _Space,
    scale: Tensor,
    rotations: Rotations,
    limit: float | None,
    out_PTHD: Tensor,
) -> None:
    pages, heads, dim = packed_PHB.shape[0], packed_PHB.shape[1], layout.head_dim
    start, quarter = layout.codes_value, layout.page_tokens // 4
    section = packed_PHB[:, :, start : start + layout.code_bytes_value]
    _index(section, dim, layout.value_bits, one.index_values)
    torch.index_select(one.value_table, 0, one.index, out=one.found)
    int8_product(one.centroids_values, rotations.value_signed_DD, one.sums)
    x_PHTD = one.floats_of(scale.dtype).mul_(scale)
    if limit is not None:
        x_PHTD.clamp_(-limit, limit)
    if layout.value_bits == 4:
        rows = x_PHTD.view(pages, heads, quarter, 2, 2, dim).permute(0, 4, 2, 3, 1, 5)
    else:
        rows = x_PHTD.view(pages, heads, quarter, 4, dim).permute(0, 3, 2, 1, 4)
    out_PTHD.view(rows.shape).copy_(rows)


def _section(packed_PHB: Tensor, offset: int, size: int) -> Tensor:
    return packed_PHB[:, :, offset : offset + size].contiguous()


def _index(section_PHB: Tensor, rows: int, bits: int, out: Tensor) -> None:
    """Fills int32 [pages, H, rows, columns / 4] with what `quad_table` is asked, for each four codes."""
    width = out.shape[3]
    if bits == 4:
        codes = section_PHB.unflatten(2, (rows, 2 * width))
        read_words(codes.view(torch.uint16), out)
        return
    out.copy_(section_PHB[:, :, : rows * width].unflatten(2, (rows, width)))
    if bits == 3:
        high = section_PHB[:, :, rows * width :].to(torch.int32).unflatten(2, (rows, width // 2))
        out[..., : width // 2] |= (high & 15) << 8
        out[..., width // 2 :] |= (high & 0xF0) << 4


@cache
def column_order(columns: int, bits: int) -> Tensor:
    """Where in a row of codes those lie that `quad_table` gives one after the other."""
    quarter = torch.arange(columns // 4)[:, None]
    if bits == 4:
        half = columns // 2
        return (2 * quarter + torch.tensor([0, half, 1, half + 1])).flatten()
    return (quarter + torch.arange(4) * (columns // 4)).flatten()
