"""A layer's operations in two calls, against the same operations one by one: the same bits."""

import pytest
import torch
from torch import Tensor

from isthmus.kernels.cpu.half_gemm import half_matmul, has_half_tiles, pack_half
from isthmus.kernels.cpu.layer_halves import heads_of_rows, rows_after_attention
from isthmus.kernels.cpu.row_ops import gated_silu, rms_norm, rotate_heads

pytestmark = pytest.mark.skipif(not has_half_tiles(), reason="this CPU lacks the instructions")

WIDTH, INNER, DIM, HEADS, ROTATED, QUERIES = 96, 150, 16, 10, 8, 6
EPS = 1e-5


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) * 1000 + shape[-1])) * 0.2


NORM, QKV, OUT = drawn(WIDTH) + 1, drawn(HEADS * DIM, WIDTH), drawn(WIDTH, QUERIES * DIM)
GATE_UP, DOWN = drawn(2 * INNER, WIDTH), drawn(WIDTH, INNER)


def before(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return heads_of_rows(x, NORM.numpy(), EPS, pack_half(QKV.half().float()), HEADS, ROTATED, cos, sin)


def after(x: Tensor, attended: Tensor) -> Tensor:
    panels = (pack_half(weight.half().float()) for weight in (OUT, GATE_UP, DOWN))
    return rows_after_attention(x, attended, NORM.numpy(), EPS, *panels)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    return half_matmul(x, pack_half(weight.half().float()), len(weight))


@pytest.mark.parametrize("tokens", [1, 2, 15, 140, 141, 300])
def test_before_attention(tokens: int) -> None:
    x, cos, sin = drawn(tokens, WIDTH) * 9, drawn(tokens, DIM), drawn(tokens, DIM)
    wanted = matmul(rms_norm(x, NORM, EPS), QKV).view(tokens, HEADS, DIM)
    rotate_heads(wanted, ROTATED, cos, sin)
    assert torch.equal(before(x, cos, sin), wanted)


@pytest.mark.parametrize("tokens", [1, 2, 15, 140, 141, 300])
def test_after_attention(tokens: int) -> None:
    x, attended = drawn(tokens, WIDTH) * 9, drawn(tokens, QUERIES, DIM)
    mixed = x + matmul(attended.view(tokens, -1), OUT)
    wanted = mixed + matmul(gated_silu(matmul(rms_norm(mixed, NORM, EPS), GATE_UP)), DOWN)
    assert torch.equal(after(x, attended), wanted)


def test_rows_do_not_depend_on_each_other() -> None:
    x, attended = drawn(200, WIDTH), drawn(200, QUERIES, DIM)
    whole = after(x, attended)
    for first, end in ((0, 1), (7, 150), (139, 142), (199, 200)):
        assert torch.equal(after(x[first:end], attended[first:end]), whole[first:end])


def test_a_damaged_row_damages_no_other() -> None:
    x, attended = drawn(3, WIDTH), drawn(3, QUERIES, DIM)
    x[1, 5] = torch.nan
    got = after(x, attended)
    assert not got[1].isfinite().any()
    assert got[0].isfinite().all() and got[2].isfinite().all()
