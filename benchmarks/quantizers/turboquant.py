"""TurboQuant (arXiv 2504.19874) as published, in PyTorch: to be compared with, not fast.

Each quantizer turns the vectors of one page and head, float64 [B, P, D], into uint8 [B, bytes] and back. B pages times
heads, P page tokens, D head dimension. Norms are stored, divided by sqrt(D) so that none overflows, as `scale16`
(`kernels/pages/layout.py`); rotations are Hadamard with seeded signs.
"""

from typing import Protocol

import torch
from torch import Tensor

from isthmus.kernels.pages.layout import from_scale16, to_scale16
from isthmus.kernels.pages.rotation import hadamard, signs

from .bits import from_bits, gaussian, nearest, points, to_bits

SEED_ROTATION, SEED_PROJECTION = 2, 3


class PageQuantizer(Protocol):
    """Vectors of a page <-> bytes."""

    def page_bytes(self) -> int: ...
    def encode(self, x_BPD: Tensor) -> Tensor: ...
    def decode(self, page_BN: Tensor) -> Tensor: ...


def rotation(dim: int) -> Tensor:
    """Orthonormal float64 [D, D]; y = x @ rotation."""
    return (hadamard(dim).double() / dim**0.5 * signs(SEED_ROTATION, dim).double()).T


def store_norms(norm: Tensor) -> Tensor:
    """uint8 [B, 2 n] of norms [B, n]."""
    return to_scale16(norm.float()).contiguous().view(torch.uint8)


def load_norms(stored: Tensor) -> Tensor:
    """float64 [B, n] of `store_norms`."""
    return from_scale16(stored.contiguous().view(torch.int16)).double()


class Mse:
    """The MSE form (algorithm 1): rotate, quantize each coordinate, keep the norm."""

    def __init__(self, dim: int, page_tokens: int, bits: int) -> None:
        self._dim, self._page, self._bits = dim, page_tokens, bits
        self._codes = page_tokens * dim * bits // 8

    def page_bytes(self) -> int:
        return self._codes + 2 * self._page

    def encode(self, x_BPD: Tensor) -> Tensor:
        norm = x_BPD.norm(dim=-1)
        y = x_BPD @ rotation(self._dim) / norm.clamp_min(1e-300)[..., None] * self._dim**0.5
        codes = nearest(y, points(self._bits))
        return torch.cat([to_bits(codes.flatten(1), self._bits), store_norms(norm / self._dim**0.5)], 1)

    def decode(self, page_BN: Tensor) -> Tensor:
        codes = from_bits(page_BN[:, : self._codes], self._bits).view(-1, self._page, self._dim)
        norm = load_norms(page_BN[:, self._codes :])
        return points(self._bits)[codes] @ rotation(self._dim).T * norm[..., None]


class Prod:
    """The inner-product form (algorithm 2): MSE at one bit less, and QJL's signs of what remains.

    The estimate of q · x is unbiased: the residual r is read as sqrt(pi / 2) / d · |r| · Sᵀ sign(S r).
    """

    def __init__(self, dim: int, page_tokens: int, bits: int) -> None:
        self._mse = Mse(dim, page_tokens, bits - 1)
        self._dim, self._page = dim, page_tokens
        self._signs = page_tokens * dim // 8

    def page_bytes(self) -> int:
        return self._mse.page_bytes() + self._signs + 2 * self._page

    def encode(self, x_BPD: Tensor) -> Tensor:
        first = self._mse.encode(x_BPD)
        rest = x_BPD - self._mse.decode(first)
        positive = rest @ gaussian(SEED_PROJECTION, self._dim).T > 0
        return torch.cat([first, to_bits(positive.flatten(1), 1), store_norms(rest.norm(dim=-1) / self._dim**0.5)], 1)

    def decode(self, page_BN: Tensor) -> Tensor:
        start = self._mse.page_bytes()
        sign = from_bits(page_BN[:, start : start + self._signs], 1).view(-1, self._page, self._dim).double() * 2 - 1
        norm = load_norms(page_BN[:, start + self._signs :]) * (torch.pi / 2 / self._dim) ** 0.5
        rest = sign @ gaussian(SEED_PROJECTION, self._dim) * norm[..., None]
        return self._mse.decode(page_BN[:, :start]) + rest


class Outliers:
    """Half a bit (the section on KV caches): the stronger half of the channels gets one bit more.

    The channels are chosen anew for each page and stored as a bit mask; each half is rotated by itself and
    has its own norm.
    """

    def __init__(self, dim: int, page_tokens: int, bits: int) -> None:
        self._dim, self._page = dim, page_tokens
        self._strong, self._weak = (Mse(dim // 2, page_tokens, b) for b in (bits + 1, bits))

    def page_bytes(self) -> int:
        return self._dim // 8 + self._strong.page_bytes() + self._weak.page_bytes()

    def encode(self, x_BPD: Tensor) -> Tensor:
        energy = x_BPD.square().sum(1)
        mask = torch.zeros_like(energy, dtype=torch.bool)
        mask.scatter_(1, energy.topk(self._dim // 2, dim=1).indices, True)
        parts = [self._half(x_BPD, chosen) for chosen in (mask, ~mask)]
        return torch.cat([to_bits(mask, 1), self._strong.encode(parts[0]), self._weak.encode(parts[1])], 1)

    def _half(self, x_BPD: Tensor, chosen_BD: Tensor) -> Tensor:
        rows = x_BPD.transpose(1, 2)[chosen_BD].view(x_BPD.shape[0], self._dim // 2, self._page)
        return rows.transpose(1, 2)

    def decode(self, page_BN: Tensor) -> Tensor:
        start, middle = self._dim // 8, self._dim // 8 + self._strong.page_bytes()
        mask = from_bits(page_BN[:, :start], 1).bool()
        x_BDP = torch.empty(page_BN.shape[0], self._dim, self._page, dtype=torch.float64)
        x_BDP[mask] = self._strong.decode(page_BN[:, start:middle]).transpose(1, 2).flatten(0, 1)
        x_BDP[~mask] = self._weak.decode(page_BN[:, middle:]).transpose(1, 2).flatten(0, 1)
        return x_BDP.transpose(1, 2)
