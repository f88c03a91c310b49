"""Compiled packing and unpacking beside their references: the same bytes but for ties, the same numbers."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from isthmus.kernels.cpu import threads
from isthmus.kernels.cpu.numbers import np_view
from isthmus.kernels.pages.codebook import MAGNITUDES, centroids, magnitude_steps
from isthmus.kernels.pages.layout import PageLayout
from isthmus.kernels.pages.pack_cpu import pack_cpu
from isthmus.kernels.pages.reference import NotFinite, join_codes, pack_reference, split_codes, unpack_reference
from isthmus.kernels.pages.rotation import Rotations, build_rotations
from isthmus.kernels.pages.tiles import to_centroids, to_codes
from isthmus.kernels.pages.unpack_cpu import unpack_cpu

BITS = ((4, 4), (4, 3), (4, 2), (3, 4), (2, 3), (2, 2))
SHAPES = ((8, 8), (64, 64), (80, 24), (96, 16), (128, 64), (192, 8), (256, 40), (320, 8))  # head dimension, page tokens


def make(bits: tuple[int, int], dim: int, page: int, heads: int) -> tuple[Rotations, PageLayout]:
    layout = PageLayout(head_dim=dim, page_tokens=page, key_bits=bits[0], value_bits=bits[1])
    return build_rotations(torch.rand(heads, dim) + 0.5, torch.device("cpu")), layout


def key_value(tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens + dim)
    return torch.randn(tokens, heads, dim) + 2 * torch.randn(heads, dim), torch.randn(tokens, heads, dim)


def check(k_THD: Tensor, v_THD: Tensor, rotations: Rotations, layout: PageLayout, dtype: torch.dtype) -> Tensor:
    """Packs and unpacks both ways; returns the bytes."""
    packed, wanted = (pack(k_THD, v_THD, rotations, layout) for pack in (pack_cpu, pack_reference))
    assert packed.shape == wanted.shape
    # Rounding of a sum moves a code now and then, or the last bit of a scale or mean.
    assert int((packed != wanted).sum()) <= 2 + wanted.numel() // 10_000
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    dense = unpack_cpu(packed, rotations, layout, dtype), unpack_reference(packed, rotations, layout, dtype)
    for got, reference in zip(*dense, strict=True):
        assert got.shape == k_THD.shape and got.dtype == dtype
        largest = float(reference.abs().max())
        assert torch.allclose(got.double(), reference.double(), atol=tolerance * largest, rtol=tolerance)
    return packed


@pytest.mark.parametrize("dim, page", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_same_as_the_references(bits: tuple[int, int], dim: int, page: int):
    rotations, layout = make(bits, dim, page, 3)
    for dtype in (torch.float32, torch.bfloat16):
        k_THD, v_THD = (x.to(dtype) for x in key_value(2 * page, 3, dim))
        check(k_THD, v_THD, rotations, layout, dtype)


@pytest.mark.parametrize("size", (0.0, 1e-45, 1e-30, 1e-10, 1e10, 1e30, 3e38))
def test_pages_of_any_size_beside_usual_ones(size: float):
    rotations, layout = make((4, 3), 16, 8, 2)
    k_THD, v_THD = key_value(32, 2, 16)
    k_THD[8:16], v_THD[16:24] = torch.rand(8, 2, 16) * size, torch.rand(8, 2, 16) * size
    packed = check(k_THD, v_THD, rotations, layout, torch.float32)
    usual = pack_cpu(k_THD[24:], v_THD[24:], rotations, layout)
    assert torch.equal(packed[3:], usual)


def test_what_is_no_number_is_refused():
    rotations, layout = make((4, 4), 16, 8, 2)
    for bad in (float("nan"), float("inf")):
        k_THD, v_THD = key_value(32, 2, 16)
        v_THD[13, 1, 3] = bad
        with pytest.raises(NotFinite):
            pack_cpu(k_THD, v_THD, rotations, layout)
        with pytest.raises(NotFinite):
            pack_cpu(v_THD, k_THD, rotations, layout)


def test_inputs_need_not_be_contiguous_nor_of_a_usual_dtype():
    rotations, layout = make((4, 4), 16, 8, 2)
    both = torch.randn(16, 2, 32, dtype=torch.float16)
    k_THD, v_THD = both.chunk(2, -1)
    packed = pack_cpu(k_THD, v_THD, rotations, layout)
    assert torch.equal(packed, pack_cpu(k_THD.float().contiguous(), v_THD.float().contiguous(), rotations, layout))
    halves = zip(unpack_cpu(packed, rotations, layout, torch.float16), (k_THD, v_THD), strict=True)
    for got, x in halves:
        assert got.dtype == torch.float16
        assert float((got - x).float().norm() / x.float().norm()) < 0.2


def test_threads_share_the_pages(monkeypatch: pytest.MonkeyPatch):
    rotations, layout = make((4, 4), 16, 8, 2)
    k_THD, v_THD = key_value(8 * 7, 2, 16)
    alone = pack_cpu(k_THD, v_THD, rotations, layout)
    dense = unpack_cpu(alone, rotations, layout, torch.float32)
    monkeypatch.setattr(threads, "_WORK_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    threads._threads.cache_clear()
    assert torch.equal(pack_cpu(k_THD, v_THD, rotations, layout), alone)
    shared = unpack_cpu(alone, rotations, layout, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(shared, dense, strict=True))
    threads._threads.cache_clear()


def test_no_pages():
    rotations, layout = make((4, 4), 16, 8, 2)
    packed = pack_cpu(torch.zeros(0, 2, 16), torch.zeros(0, 2, 16), rotations, layout)
    assert packed.shape == (0, 2 * layout.head_bytes)
    assert unpack_cpu(packed, rotations, layout, torch.float32)[0].shape == (0, 2, 16)


@pytest.mark.parametrize("bits", MAGNITUDES)
def test_codes_of_every_number(bits: int):
    grid = torch.arange(-126, 127, dtype=torch.int8)
    steps, half = torch.tensor(magnitude_steps(bits), dtype=torch.int8), 1 << (bits - 1)
    codes, points = torch.zeros(253, dtype=torch.uint8), torch.zeros(253, dtype=torch.int8)
    to_codes(np_view(grid), np_view(steps), half, np_view(codes))
    to_centroids(np_view(codes), np_view(steps), half, np_view(points))
    midpoints = [sum(pair) // 2 for pair in pairwise(centroids(bits))]
    assert codes.tolist() == [sum(number >= middle for middle in midpoints) for number in grid.tolist()]
    assert points.tolist() == [centroids(bits)[code] for code in codes.tolist()]


@pytest.mark.parametrize("bits", MAGNITUDES)
def test_codes_are_joined_and_split(bits: int):
    codes = torch.randint(0, 1 << bits, (2, 3, 5, 24), dtype=torch.uint8)
    section = join_codes(codes, bits)
    assert section.shape == (2, 3, 5 * 24 * bits // 8)
    assert torch.equal(split_codes(section, 5, bits), codes)
