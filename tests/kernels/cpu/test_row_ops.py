"""Compiled row operations against PyTorch's."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from isthmus.kernels.cpu.row_ops import (
    compiles,
    gated_silu,
    gated_silu_reference,
    has_row_ops,
    rms_norm,
    rotate_heads,
    rotate_reference,
)

SHAPES = [(1, 1, 2), (1, 3, 34), (2, 5, 64), (1, 300, 1030)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def norm(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, torch.linspace(-1, 2, x.shape[-1]), 1e-5)


def norm_reference(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), torch.linspace(-1, 2, x.shape[-1]), 1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("fast", "plain"), [(gated_silu, gated_silu_reference), (norm, norm_reference)])
def test_rows(
    fast: Callable[[torch.Tensor], torch.Tensor], plain: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 5
    torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)
    for row in range(shape[1]):  # alone, a row gives what it gives beside others, to the bit
        assert torch.equal(fast(x[:, row : row + 1].contiguous()), fast(x)[:, row : row + 1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("tokens", "heads", "rotated", "dim"), [(1, 1, 1, 2), (7, 5, 3, 6), (300, 15, 12, 64)])
def test_rotation(tokens: int, heads: int, rotated: int, dim: int) -> None:
    x, cos, sin = torch.randn(tokens, heads, dim), torch.randn(tokens, dim), torch.randn(tokens, dim)
    wanted = torch.cat((rotate_reference(x[:, :rotated], cos, sin), x[:, rotated:]), dim=1)
    rotate_heads(x, rotated, cos, sin)
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-5)


def test_great_numbers() -> None:
    gate = torch.tensor([-1e30, -100.0, -88.0, 0.0, 88.0, 100.0, 1e30])
    x = torch.cat((gate, torch.ones(7)))[None]
    torch.testing.assert_close(gated_silu(x), F.silu(gate)[None], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fast", [gated_silu, norm])
def test_a_damaged_number_stays_one(fast: Callable[[torch.Tensor], torch.Tensor], value: float) -> None:
    x = torch.ones(2, 8)
    x[1, 2] = value
    bad = fast(x)
    assert not bad[1].isfinite().all() and bad[0].isfinite().all()


def test_what_is_left_to_pytorch() -> None:
    x = torch.ones(4, 4)
    assert compiles(x) is has_row_ops()
    assert not compiles(x.bfloat16()) and not compiles(x.T[:2].T) and not compiles(x.to("meta"))
