"""What holds for every codec that packs: ours, and the published ones that benchmarks compare them with."""

import hashlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import PageCodec
from isthmus.proto.errors import InvalidRequest

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SIZES = (0.0, 1e-45, 1e-40, 1e-38, 1e-20, 1e-4, 1e4, 1e20, 1e37, 3.4e38)
Build = Callable[[str, Sequence[LayerShape], int], PageCodec]


def example(tokens: int, heads: int, dim: int) -> Tensor:
    """[T, H, D]: 29 t + 31 h + 53 c mod 97, less 48."""
    t, h, c = torch.arange(tokens), torch.arange(heads), torch.arange(dim)
    return ((29 * t[:, None, None] + 31 * h[None, :, None] + 53 * c[None, None, :]) % 97 - 48).float()


def layer(heads: int, dim: int) -> list[LayerShape]:
    return [LayerShape(kv_heads=heads, head_dim=dim)]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def digest(data: Tensor) -> str:
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def check_error(build: Build, name: str, dim: int) -> None:
    """The error is what the bits allow."""
    torch.manual_seed(dim)
    k_THD, v_THD = torch.randn(128, 2, dim), torch.randn(128, 2, dim)
    codec = build(name, layer(2, dim), 64)
    packed = codec.encode(0, k_THD.bfloat16(), v_THD.bfloat16())
    assert packed.shape == (2, codec.page_bytes(0))
    assert codec.page_bytes(0) % 16 == 0
    k_got, v_got = codec.decode(0, packed, torch.float32)
    largest = {"fp8": 0.03, "tq-k4v4": 0.1, "tq-k4v3": 0.19, "tq-k3v3": 0.19}
    limit = largest.get(name, 0.8 if "prod" in name else 0.36)
    assert error(k_got, k_THD) < limit
    assert error(v_got, v_THD) < limit


def check_size(build: Build, name: str, size: float) -> None:
    """Every finite page packs."""
    torch.manual_seed(0)
    x_THD = (torch.rand(64, 2, 64) * 2 - 1) * size
    codec = build(name, layer(2, 64), 64)
    for got in codec.decode(0, codec.encode(0, x_THD, -x_THD), torch.float32):
        assert bool(got.isfinite().all())
        if size == 0:
            assert not bool(got.any())
    if size > 1e-37 and "prod" not in name:
        assert error(codec.decode(0, codec.encode(0, x_THD, x_THD), torch.float32)[0], x_THD) < 0.4


def check_mixed_sizes(build: Build, name: str) -> None:
    """Lonely channels and mixed sizes pack."""
    codec = build(name, layer(1, 64), 64)
    x_THD = torch.zeros(64, 1, 64)
    x_THD[3, 0, 5], x_THD[9, 0, 63], x_THD[10] = 7.0, -3e38, 1e-44
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for got in codec.decode(0, codec.encode(0, x_THD, x_THD), dtype):
            assert bool(got.isfinite().all())


def check_refused(build: Build, name: str, bad: float) -> None:
    """What is no number is refused."""
    codec = build(name, layer(3, 64) * 2, 64)
    k_THD, v_THD = torch.randn(128, 3, 64), torch.randn(128, 3, 64)
    v_THD[77, 2, 5] = bad
    with pytest.raises(InvalidRequest, match=r"layer 1, KV head 2: the values of token 77"):
        codec.encode(1, k_THD, v_THD)
    with pytest.raises(InvalidRequest, match=r"layer 0, KV head 2: the keys of token 77"):
        codec.encode(0, v_THD, k_THD)


def check_neighbours(build: Build, name: str) -> None:
    """Pages do not depend on their neighbours."""
    torch.manual_seed(0)
    k_THD, v_THD = torch.randn(640, 3, 64), torch.randn(640, 3, 64)
    codec = build(name, layer(3, 64), 64)
    together = codec.encode(0, k_THD, v_THD)
    one = codec.encode(0, k_THD[192:256], v_THD[192:256])
    k_all, v_all = codec.decode(0, together, torch.float32)
    k_one, v_one = codec.decode(0, one, torch.float32)
    # Products of another number of rows may round differently: not the bytes, but what they mean is the same.
    assert float((together[3] != one[0]).float().mean()) < 0.01
    assert error(k_one, k_all[192:256]) < 0.05
    assert error(v_one, v_all[192:256]) < 0.05
