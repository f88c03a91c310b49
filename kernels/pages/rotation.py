"""Rotations: Hadamard matrices with random signs.

    H = Sylvester(2^k) ⊗ Paley(m),  d = m 2^k,  m in {1, 12, 20}

Entries are ±1, so a rotation of integer centroids is exact in fp32 and the same on every machine; with the
orders 12 and 20 (Paley's first construction over the primes 11 and 19) the head dimensions 80, 96, 160, 192
mix as well as powers of two do.
"""

from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from ..splitmix64 import outputs

SEED_KEYS, SEED_VALUES = 1, 2  # of the signs
_MIN_HEAD_DIM, _MAX_HEAD_DIM = 8, 512
_PALEY_ORDERS = (1, 12, 20)


def head_dims() -> tuple[int, ...]:
    """All head dimensions of packed pages, ascending: those that split into four blocks of rotations."""
    candidates = range(_MIN_HEAD_DIM, _MAX_HEAD_DIM + 1, 8)
    return tuple(d for d in candidates for power, _ in _splits(d) if power >= 4)


def _splits(dim: int) -> list[tuple[int, int]]:
    """All (2^k, m) with dim = 2^k m; there is at most one."""
    found = [(dim // order, order) for order in _PALEY_ORDERS if dim % order == 0]
    return [(power, order) for power, order in found if power & (power - 1) == 0]


def _split(dim: int) -> tuple[int, int]:
    splits = _splits(dim)
    if not splits:
        raise ValueError(f"no Hadamard matrix of order {dim}")
    return splits[0]


def _paley(order: int) -> Tensor:
    """Hadamard matrix of order q + 1 for a prime q = 3 (mod 4), entries ±1; [[1]] for order 1."""
    if order == 1:
        return torch.ones(1, 1)
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    rows = torch.arange(q)
    skew = torch.zeros(order, order)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = chi[(rows[None, :] - rows[:, None]) % q]
    return skew + torch.eye(order)


def _sylvester(power: int) -> Tensor:
    """[power, power] of ±1, power = 2^k: entry (i, j) is negative where i & j has an odd number of bits."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


@cache
def hadamard(head_dim: int) -> Tensor:
    """[d, d] of ±1 with H Hᵀ = d I. ValueError where there is no such m and k."""
    power, order = _split(head_dim)
    return torch.kron(_sylvester(power), _paley(order)).contiguous()


@cache
def paley_factor(head_dim: int) -> Tensor:
    """[m, m] of ±1, the second factor of `hadamard(head_dim)`."""
    return _paley(_split(head_dim)[1])


def signs(seed: int, head_dim: int) -> Tensor:
    """[d] of ±1: entry i is negative where the top bit of splitmix64's i-th output for this seed is set."""
    return torch.tensor([-1.0 if output >> 63 else 1.0 for output in islice(outputs(seed), head_dim)])


@dataclass(frozen=True)
class Rotations:
    """W_k = H diag(signs / balance) / sqrt(d) of each KV head of a layer, W_v = H diag(signs) / sqrt(d) of all its
    heads, and their inverses, as the kernels take them: float32 and contiguous, on the device of the pages."""

    key_inverse_HDD: Tensor  # W_k⁻¹ = diag(key_gain) Hᵀ
    value_inverse_DD: Tensor  # W_v⁻¹
    key_gain_HD: Tensor  # signs · balance / sqrt(d)
    value_gain_D: Tensor  # signs / sqrt(d)
    key_weight_HD: Tensor  # signs / balance
    value_weight_D: Tensor  # signs


def build_rotations(balance_HD: Tensor, device: torch.device) -> Rotations:
    """The rotations of a layer whose key channels have this balance."""
    dim = balance_HD.shape[1]
    orthonormal_DD = hadamard(dim).double() / dim**0.5
    key_signs_D, value_signs_D = signs(SEED_KEYS, dim).double(), signs(SEED_VALUES, dim).double()
    balance = balance_HD.double()
    parts = (
        orthonormal_DD.T * (key_signs_D * balance)[:, :, None],
        orthonormal_DD.T * value_signs_D[:, None],
        key_signs_D * balance / dim**0.5,
        value_signs_D / dim**0.5,
        key_signs_D / balance,
        value_signs_D,
    )
    return Rotations(*(part.float().contiguous().to(device) for part in parts))
