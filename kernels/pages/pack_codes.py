"""Pairs of codes -> the sections codesK and codesV of a page (`layout.py`).

A pair is a byte with the code of dimension c in its low and of c + D/2 in its high half, so that a few shifts and masks
of whole bytes join the codes of two or four columns.
"""

import torch
from torch import Tensor

from .layout import code_groups


def store_keys(section_PHB: Tensor, pairs_PHTC: Tensor, bits: int) -> None:
    """Fills codesK: rows are tokens. C = D / 2 pairs."""
    rows = pairs_PHTC.shape[2]
    low, high = _joined_keys(pairs_PHTC, bits)
    size = rows * low.shape[3]
    section_PHB[:, :, :size].unflatten(2, (rows, -1)).copy_(low)
    if high is not None:
        section_PHB[:, :, size:].unflatten(2, (rows, -1)).copy_(high)


def _joined_keys(pairs: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    if bits == 4:
        return pairs, None
    first, second = pairs.chunk(2, -1)  # dimensions c and c + D/2, and those a quarter further
    if bits == 2:
        return second << 2 | first, None
    high = (second >> 1 & 0x22) | (first >> 2 & 0x11)  # bits 0, 1: groups 0, 1; bits 4, 5: groups 2, 3
    nibble = (high & 3) | (high >> 2 & 12)
    near, far = nibble.chunk(2, -1)
    return (second & 0x33) << 2 | (first & 0x33), far << 4 | near


def store_values(section_PHB: Tensor, pairs_PTHC: Tensor, bits: int) -> None:
    """Fills codesV: rows are dimensions, columns tokens."""
    groups, columns = code_groups(bits), pairs_PTHC.shape[3]
    width = pairs_PTHC.shape[1] // groups
    parts = pairs_PTHC.split(width, 1)
    if bits == 4:
        _columns(section_PHB, parts[0], parts[1])
        return
    if bits == 2:
        _columns(section_PHB, parts[1] << 2 | parts[0], parts[3] << 2 | parts[2])
        return
    low = [part & 0x33 for part in parts]
    size = 2 * columns * width
    _columns(section_PHB[:, :, :size], low[1] << 2 | low[0], low[3] << 2 | low[2])
    high = torch.zeros_like(parts[0])
    for i, part in enumerate(parts):
        high |= (part >> 2 & 0x11) << i
    _columns(section_PHB[:, :, size:], high[:, : width // 2], high[:, width // 2 :])


def _columns(section_PHB: Tensor, a_PTHC: Tensor, b_PTHC: Tensor) -> None:
    """Rows of dimensions c and c + D/2 from the low and the high halves of a, and above them those of b."""
    columns = a_PTHC.shape[3]
    rows_PTHC = section_PHB.unflatten(2, (2, columns, -1)).permute(2, 0, 4, 1, 3)
    rows_PTHC[0].copy_((b_PTHC << 4).bitwise_or_(a_PTHC & 15))
    rows_PTHC[1].copy_((a_PTHC >> 4).bitwise_or_(b_PTHC & 0xF0))
