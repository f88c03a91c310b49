"""PolarQuant (arXiv 2502.02617): rotated vectors in recursive polar coordinates, angles quantized, radii kept.

Blocks of 16 coordinates: 8 angles of pairs in [0, 2 pi), then 4, 2 and 1 angles in [0, pi/2] between radii,
and one radius. For rotated (normal) coordinates the angle of level l > 1 has the density ~ sin(2
psi)^(2^(l-1) - 1); its quantizer is Lloyd-Max for that density. Angles of the first level are uniform.
"""

from functools import cache

import torch
from torch import Tensor

from .bits import from_bits, nearest, to_bits
from .turboquant import load_norms, rotation, store_norms

_BLOCK = 16
# Bits of the angles of each level. With 16 bits for the radius: 3.875 and 2.9375 bits a coordinate.
_BITS = {4: (4, 2, 2, 2), 3: (3, 1, 1, 1)}


@cache
def _levels(level: int, bits: int) -> Tensor:
    """float64 [2^bits] angles, ascending: Lloyd-Max of level 2, 3, 4, ..."""
    psi = (torch.arange(20000, dtype=torch.float64) + 0.5) * (torch.pi / 2 / 20000)
    density = torch.sin(2 * psi) ** (2 ** (level - 1) - 1)
    chosen = torch.linspace(0.3, torch.pi / 2 - 0.3, 1 << bits, dtype=torch.float64)
    for _ in range(300):
        cell = nearest(psi, chosen)
        mass = torch.zeros_like(chosen).index_add_(0, cell, density)
        chosen = torch.zeros_like(chosen).index_add_(0, cell, density * psi) / mass
    return chosen


class Polar:
    """See `PageQuantizer`. The head dimension is a multiple of 16."""

    def __init__(self, dim: int, page_tokens: int, bits: int) -> None:
        self._dim, self._page, self._bits = dim, page_tokens, _BITS[bits]
        self._blocks = page_tokens * dim // _BLOCK

    def _sizes(self) -> list[int]:
        return [self._blocks * (_BLOCK >> (i + 1)) * bits // 8 for i, bits in enumerate(self._bits)]

    def page_bytes(self) -> int:
        return sum(self._sizes()) + 2 * self._blocks

    def encode(self, x_BPD: Tensor) -> Tensor:
        y = (x_BPD @ rotation(self._dim)).reshape(x_BPD.shape[0], self._blocks, _BLOCK)
        step = 2 * torch.pi / (1 << self._bits[0])
        angle = torch.atan2(y[..., 1::2], y[..., ::2]).remainder(2 * torch.pi)
        sections = [to_bits((angle / step).floor().clamp_max((1 << self._bits[0]) - 1).flatten(1), self._bits[0])]
        radius = torch.hypot(y[..., ::2], y[..., 1::2])
        for level, bits in enumerate(self._bits[1:], 2):
            angle = torch.atan2(radius[..., 1::2], radius[..., ::2])
            sections.append(to_bits(nearest(angle.contiguous(), _levels(level, bits)).flatten(1), bits))
            radius = torch.hypot(radius[..., ::2], radius[..., 1::2])
        return torch.cat([*sections, store_norms(radius[..., 0] / _BLOCK**0.5)], 1)

    def decode(self, page_BN: Tensor) -> Tensor:
        *sections, norms = page_BN.split([*self._sizes(), 2 * self._blocks], 1)
        radius = load_norms(norms)[..., None] * _BLOCK**0.5
        for level in range(len(self._bits), 1, -1):
            bits = self._bits[level - 1]
            angle = _levels(level, bits)[from_bits(sections[level - 1], bits)].view(radius.shape)
            radius = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)
        codes = from_bits(sections[0], self._bits[0]).view(radius.shape)
        angle = (codes + 0.5) * (2 * torch.pi / (1 << self._bits[0]))
        y = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)
        return y.view(page_BN.shape[0], self._page, self._dim) @ rotation(self._dim).T
