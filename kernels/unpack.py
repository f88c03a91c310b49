"""Packed pages -> dense keys and values (layout: `layout.py`; the inverse of `pack.py`).

    key   = gain · (scale · Hᵀ centroids + Hᵀ mean)
    value = gain · scale · Hᵀ centroids

Hᵀ centroids are sums of 8-bit integers, so they are exact, in whichever way they are made: by the 8-bit products of
the CPU where PyTorch offers them (a third of the time), or else in fp32. Values outside of the range of the wanted
dtype become its largest or smallest finite value.
"""

from functools import cache

import torch
from torch import Tensor

from .codebook import quad_table
from .layout import PageLayout, code_groups
from .pack import Rotations, chunks, words
from .rotation import hadamard
from .scale16 import from_scale16
from .scratch import scratch

_LARGE = 1e30  # scales and means over this may overflow fp32 on the way: float64


def unpack_reference(
    packed_PB: Tensor, rotations: Rotations, layout: PageLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H, D] of packed pages uint8 [pages, H * head_bytes]."""
    pages = packed_PB.shape[0]
    heads, dim, page = rotations.key_HDD.shape[0], layout.head_dim, layout.page_tokens
    k_PTHD = torch.empty(pages, page, heads, dim, dtype=dtype, device=packed_PB.device)
    v_PTHD = torch.empty_like(k_PTHD)
    if pages:
        packed_PHB = packed_PB.view(pages, heads, layout.head_bytes)
        for start, end in chunks(pages * page, page, heads * dim):
            rows = slice(start // page, end // page)
            _unpack_keys(packed_PHB[rows], rotations, layout, k_PTHD[rows])
            _unpack_values(packed_PHB[rows], rotations, layout, v_PTHD[rows])
    return k_PTHD.flatten(0, 1), v_PTHD.flatten(0, 1)


def _unpack_keys(packed_PHB: Tensor, rotations: Rotations, layout: PageLayout, out_PTHD: Tensor) -> None:
    pages, heads = packed_PHB.shape[:2]
    page, dim, bits = layout.page_tokens, layout.head_dim, layout.key_bits
    section = packed_PHB[:, :, : layout.code_bytes_key]
    shape = (pages, heads, page, dim // 4)
    index = _index(section, page, dim, bits, scratch("index", shape, torch.int32, section.device))
    sums = _sums(_centroids(index, bits).view(-1, dim), _key_matrix(dim, bits, section.device))
    x_PHTD = scratch("floats", (pages, heads, page, dim), torch.float32, section.device).copy_(sums.view(*shape[:3], dim))
    scale = _scales(packed_PHB, layout.scale_key, page)
    mean = packed_PHB[:, :, layout.mean_key : layout.mean_key + 2 * dim].contiguous().view(torch.bfloat16).float()
    matrix, gain = hadamard(dim).to(mean.device), rotations.key_gain_HD[:, None]
    largest = float(torch.maximum(scale.amax(), mean.abs().amax()))
    if largest > _LARGE:
        x_PHTD, scale, mean, matrix, gain = (x.double() for x in (x_PHTD, scale, mean, matrix, gain))
    torch.addcmul((mean @ matrix)[:, :, None], x_PHTD, scale[..., None], out=x_PHTD).mul_(gain)
    _clamp(x_PHTD, largest, out_PTHD.dtype)
    out_PTHD.copy_(x_PHTD.transpose(1, 2))


def _unpack_values(packed_PHB: Tensor, rotations: Rotations, layout: PageLayout, out_PTHD: Tensor) -> None:
    pages, heads = packed_PHB.shape[:2]
    page, dim, bits = layout.page_tokens, layout.head_dim, layout.value_bits
    section = packed_PHB[:, :, layout.codes_value : layout.codes_value + layout.code_bytes_value]
    # Dimensions first: one matrix, whose columns are the tokens of all pages and heads.
    index = scratch("index", (dim, pages, heads, page // 4), torch.int32, section.device)
    _index(section, dim, page, bits, index.permute(1, 2, 0, 3))
    sums = _sums(_centroids(index, bits).view(dim, -1).T, rotations.value_signed_DD)
    order = _column_order(page, bits)
    scale = _scales(packed_PHB, layout.scale_value, page) * dim**-0.5
    largest = float(scale.amax())
    if largest > _LARGE:
        scale = scale.double()
    x_PHTD = scratch("floats", (pages, heads, page, dim), scale.dtype, section.device)
    torch.mul(sums.view(x_PHTD.shape), scale[:, :, order, None], out=x_PHTD)
    _clamp(x_PHTD, largest * dim, out_PTHD.dtype)
    if bits == 4:  # tokens 2 m, 2 m + P/2, 2 m + 1, 2 m + 1 + P/2
        rows = x_PHTD.view(pages, heads, page // 4, 2, 2, dim).permute(0, 4, 2, 3, 1, 5)
        out_PTHD.view(rows.shape).copy_(rows)
    else:  # tokens m, m + P/4, m + P/2, m + 3P/4
        rows = x_PHTD.view(pages, heads, page // 4, 4, dim).permute(0, 3, 2, 1, 4)
        out_PTHD.view(rows.shape).copy_(rows)


def _index(section_PHB: Tensor, rows: int, columns: int, bits: int, out: Tensor) -> Tensor:
    """int32 [pages, H, rows, columns / 4]: what `quad_table` is asked, for each four codes."""
    if bits == 4:
        return words(section_PHB.unflatten(2, (rows, columns // 2)), out)
    width = columns // code_groups(bits)
    out.copy_(section_PHB[:, :, : rows * width].unflatten(2, (rows, width)))
    if bits == 3:
        high = section_PHB[:, :, rows * width :].to(torch.int32).unflatten(2, (rows, width // 2))
        out[..., : width // 2] |= (high & 15) << 8
        out[..., width // 2 :] |= (high & 0xF0) << 4
    return out


def _centroids(index: Tensor, bits: int) -> Tensor:
    """int8, four for each entry of a contiguous index."""
    found = scratch("centroids", tuple(index.shape), torch.int32, index.device)
    torch.index_select(quad_table(bits).to(index.device), 0, index.view(-1), out=found.view(-1))
    return found.view(torch.int8)


@cache
def _column_order(columns: int, bits: int) -> Tensor:
    """Where in a row the codes lie that `_centroids` gives one after the other."""
    quarter = torch.arange(columns // 4)[:, None]
    if bits == 4:
        return (2 * quarter + torch.tensor([0, columns // 2, 1, columns // 2 + 1])).flatten()
    return (quarter + torch.arange(4) * (columns // 4)).flatten()


@cache
def _key_matrix(dim: int, bits: int, device: torch.device) -> Tensor:
    """int8 H with rows in the order of `_centroids`."""
    return hadamard(dim)[_column_order(dim, bits)].to(device=device, dtype=torch.int8)


def _sums(centroids_RD: Tensor, matrix_DD: Tensor) -> Tensor:
    """centroids · matrix of int8, exact: int32 from 8-bit products, or float32."""
    shape = tuple(centroids_RD.shape)
    if centroids_RD.device.type == "cpu" and _has_int8_products():
        return torch._int_mm(centroids_RD, matrix_DD, out=scratch("sums", shape, torch.int32, matrix_DD.device))
    return torch.mm(centroids_RD.float(), matrix_DD.float())


@cache
def _has_int8_products() -> bool:
    """Whether this CPU multiplies int8 matrices fast and right: oneDNN with the VNNI instructions, tried once."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    probe = torch.arange(-127, 129).clamp_max(127).to(torch.int8).view(2, 128)
    matrix = hadamard(128).to(torch.int8)
    return torch.equal(torch._int_mm(probe, matrix).float(), probe.float() @ matrix.float())


def _scales(packed_PHB: Tensor, offset: int, page_tokens: int) -> Tensor:
    return from_scale16(packed_PHB[:, :, offset : offset + 2 * page_tokens].contiguous().view(torch.int16))


def _clamp(x: Tensor, largest: float, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    if largest > min(_LARGE, limit / 4096):
        x.clamp_(-limit, limit)
