"""Products with fp16 weights: any shape, exact weights, and the same bits for a row whatever stands beside it."""

import pytest
import torch

from isthmus.kernels.cpu.half_gemm import half_matmul, has_half_tiles, pack_half

pytestmark = pytest.mark.skipif(not has_half_tiles(), reason="this CPU lacks the instructions")


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 13, 14, 15, 29, 48, 49, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 16), (33, 31), (64, 32), (65, 33), (300, 96), (129, 161)])
def test_any_shape(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(rows + inputs)
    weight, x = torch.randn(outputs, inputs).half(), torch.randn(rows, inputs)
    got = half_matmul(x, pack_half(weight.float()), outputs)
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, atol=1e-4, rtol=1e-5)


def test_rows_that_do_not_lie_in_one_piece() -> None:
    weight, x = torch.randn(40, 24).half(), torch.randn(24, 30).T
    torch.testing.assert_close(half_matmul(x, pack_half(weight.float()), 40), x @ weight.float().T)


def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    weight, x = torch.randn(70, 200).half(), torch.randn(130, 200)
    packed = pack_half(weight.float())
    whole = half_matmul(x, packed, 70)
    for first, end in ((0, 1), (3, 9), (40, 54), (47, 49), (1, 130)):
        assert torch.equal(half_matmul(x[first:end], packed, 70), whole[first:end])


def test_threads_share_the_outputs() -> None:
    weight, x = torch.randn(1000, 200).half(), torch.randn(20, 200)
    packed, before = pack_half(weight.float()), torch.get_num_threads()
    alone = half_matmul(x, packed, 1000)
    try:
        torch.set_num_threads(3)
        assert torch.equal(half_matmul(x, packed, 1000), alone)
    finally:
        torch.set_num_threads(before)


def test_infinity_and_nan_come_through() -> None:
    x = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [1.0, 1.0]])
    got = half_matmul(x, pack_half(torch.ones(3, 2)), 3)
    assert got[0].isinf().all()
    assert got[1].isnan().all()
    assert got[2].tolist() == [2.0, 2.0, 2.0]
