"""The CPU paths with and without 8-bit products: the same bytes, the same numbers."""

import pytest
import torch

from isthmus.kernels.cpu import int8_product
from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.names import TQ_BITS
from isthmus.kvtransfer.codecs.registry import build_codec


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_product, "_is_fast", lambda: False)


def round_trip(name: str, dim: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    k_THD, v_THD = torch.randn(24, 2, dim) + 1, torch.randn(24, 2, dim)
    codec = build_codec(name, [LayerShape(kv_heads=2, head_dim=dim)], 8, [torch.rand(2, dim) + 0.5])
    packed = codec.encode(0, k_THD, v_THD)
    return [packed, *codec.decode(0, packed, torch.float32)]


WANTED = {(name, dim): round_trip(name, dim) for name in TQ_BITS for dim in (16, 80)}


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(("name", "dim"), WANTED)
def test_results_do_not_depend_on_the_instructions(name: str, dim: int):
    assert all(torch.equal(a, b) for a, b in zip(round_trip(name, dim), WANTED[name, dim], strict=True))


def test_sums_are_exact():
    torch.manual_seed(0)
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((37, 128), (128, 24)))
    out = torch.empty(37, 24, dtype=torch.int32)
    assert torch.equal(int8_product.int8_product(a, b, out), (a.long() @ b.long()).int())
    out = torch.empty(128, 128, dtype=torch.int32)
    assert torch.equal(int8_product.int8_product(a[:24].T, b.T, out), (a[:24].T.long() @ b.T.long()).int())


def test_scratch_of_inference_mode_serves_outside_of_it():
    x_THD = torch.randn(40, 3, 32)
    codec = build_codec("tq-k4v4", [LayerShape(kv_heads=3, head_dim=32)], 8)
    with torch.inference_mode():
        inside = codec.encode(0, x_THD, x_THD)
        codec.decode(0, inside, torch.float32)
    assert torch.equal(codec.encode(0, x_THD, x_THD), inside)
    codec.decode(0, inside.clone(), torch.float32)
