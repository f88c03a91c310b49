"""Packed pages -> dense keys and values (layout: `layout.py`; the inverse of `pack.py`).

    key   = W⁻¹ (scale · centroids + mean)
    value = W⁻¹ (scale · centroids)

Values outside of the range of the wanted dtype become its largest or smallest finite value.
"""

from functools import cache

import torch
from torch import Tensor

from .codebook import centroids
from .layout import PageLayout, code_groups
from .pack import Rotations, chunks
from .rotation import sylvester
from .scale16 import from_scale16

_LARGE = 1e30  # scales and means over this may overflow fp32 on the way: clamp


def unpack_reference(
    packed_PB: Tensor, rotations: Rotations, layout: PageLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H, D] of packed pages uint8 [pages, H * head_bytes]."""
    pages = packed_PB.shape[0]
    heads, dim, page = rotations.key_HDD.shape[0], layout.head_dim, layout.page_tokens
    packed_PHB = packed_PB.view(pages, heads, layout.head_bytes)
    k_PTHD = torch.empty(pages, page, heads, dim, dtype=dtype, device=packed_PB.device)
    v_PTHD = torch.empty_like(k_PTHD)
    for start, end in chunks(pages * page, page, heads * dim):
        rows = slice(start // page, end // page)
        _unpack_keys(packed_PHB[rows], rotations.key_inverse_HDD, layout, k_PTHD[rows])
        _unpack_values(packed_PHB[rows], rotations.value_inverse_DD, layout, v_PTHD[rows])
    return k_PTHD.flatten(0, 1), v_PTHD.flatten(0, 1)


def _unpack_keys(packed_PHB: Tensor, inverse_HDD: Tensor, layout: PageLayout, out_PTHD: Tensor) -> None:
    pages, heads = packed_PHB.shape[:2]
    page, dim, groups = layout.page_tokens, layout.head_dim, code_groups(layout.key_bits)
    width = dim // groups
    section = packed_PHB[:, :, : layout.code_bytes_key].transpose(0, 1)
    index = code_index(section, page, dim, layout.key_bits).flatten()
    scale = _scales(packed_PHB, layout.scale_key, page)[..., None]
    mean = _section(packed_PHB, layout.mean_key, 2 * dim).view(torch.bfloat16).float()
    mean_HPD = _apply(mean, inverse_HDD)
    for i, table in enumerate(_butterfly(layout.key_bits)):
        # Row block i of the inverse rotation sees only the sums of the outermost Hadamard stages, which the
        # table holds.
        sums = table.to(index.device).index_select(0, index).view(heads, pages * page, width)
        columns = slice(i * width, (i + 1) * width)
        x = torch.bmm(sums, inverse_HDD[:, columns, :width].transpose(1, 2)).view(heads, pages, page, width)
        x = torch.addcmul(mean_HPD[:, :, None, columns], x, scale)
        _store(out_PTHD[..., columns], x, float(torch.maximum(scale.amax(), mean.abs().amax())))


def _unpack_values(packed_PHB: Tensor, inverse_DD: Tensor, layout: PageLayout, out_PTHD: Tensor) -> None:
    pages, heads = packed_PHB.shape[:2]
    page, dim, groups = layout.page_tokens, layout.head_dim, code_groups(layout.value_bits)
    width = page // groups
    section = packed_PHB[:, :, layout.codes_value : layout.codes_value + layout.code_bytes_value]
    index = code_index(section.transpose(0, 1), dim, page, layout.value_bits).flatten()
    scale = _scales(packed_PHB, layout.scale_value, page)[..., None]
    largest = float(scale.amax())
    for i, table in enumerate(_plain(layout.value_bits)):
        points = table.to(index.device).index_select(0, index).view(heads * pages, dim, width)
        x = torch.matmul(points.transpose(1, 2), inverse_DD.T).view(heads, pages, width, dim)
        rows = slice(i * width, (i + 1) * width)
        _store(out_PTHD[:, rows], x.mul_(scale[:, :, rows]), largest)


def _section(packed_PHB: Tensor, offset: int, size: int) -> Tensor:
    """Contiguous bytes [H, pages, size]."""
    return packed_PHB[:, :, offset : offset + size].transpose(0, 1).contiguous()


def _scales(packed_PHB: Tensor, offset: int, page_tokens: int) -> Tensor:
    return from_scale16(_section(packed_PHB, offset, 2 * page_tokens).view(torch.int16))


def _apply(x_HPD: Tensor, inverse_HDD: Tensor) -> Tensor:
    """Un-rotated page means, exact for any bf16."""
    if float(x_HPD.abs().amax()) < _LARGE:
        return torch.bmm(x_HPD, inverse_HDD.transpose(1, 2))
    limit = torch.finfo(torch.float32).max
    return torch.bmm(x_HPD.double(), inverse_HDD.double().transpose(1, 2)).clamp(-limit, limit).float()


def _store(out_PTHD: Tensor, x_HPTD: Tensor, largest: float) -> None:
    limit = torch.finfo(out_PTHD.dtype).max
    if largest > min(_LARGE, limit / 4096):
        x_HPTD = x_HPTD.clamp(-limit, limit)
    out_PTHD.copy_(x_HPTD.permute(1, 2, 0, 3))


def code_index(section: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """int32 [..., rows, columns / groups]: all the codes that share a byte, the high plane above the low
    one."""
    width = columns // code_groups(bits)
    low = section[..., : rows * width].to(torch.int32).reshape(*section.shape[:-1], rows, width)
    if bits != 3:
        return low
    packed = section[..., rows * width :].reshape(*section.shape[:-1], rows, width // 2)
    return low | torch.cat([packed & 15, packed >> 4], -1).to(torch.int32) << 8


@cache
def _plain(bits: int) -> tuple[Tensor, ...]:
    """For each group, the centroid by `code_index`: float32 [256], or [4096] at 3 bits."""
    points = torch.tensor(centroids(bits), dtype=torch.float32)
    index = torch.arange(4096 if bits == 3 else 256)
    if bits == 4:
        return points[index & 15].contiguous(), points[index >> 4].contiguous()
    low = [index >> (2 * i) & 3 for i in range(4)]
    high = [(index >> (8 + i) & 1) << 2 for i in range(4)]
    return tuple(points[a | b].contiguous() for a, b in zip(low, high, strict=True))


@cache
def _butterfly(bits: int) -> tuple[Tensor, ...]:
    """For each group i, sum over groups j of Sylvester(i, j) times the centroid of group j, by
    `code_index`."""
    groups = torch.stack(_plain(bits))
    return tuple(row.contiguous() for row in sylvester(groups.shape[0]) @ groups)
