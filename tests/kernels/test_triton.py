"""Triton kernels beside their references, under Triton's interpreter: odd shapes, all widths, no GPU."""

import pytest
import torch
from torch import Tensor

from isthmus.kernels.attention.paged import PagedKV, gather_sequence, paged_attention_reference
from isthmus.kernels.attention.paged_triton import paged_attention
from isthmus.kernels.attention.triton_path import has_triton, triton_works
from isthmus.kernels.pages.layout import PageLayout
from isthmus.kernels.pages.pack_triton import pack
from isthmus.kernels.pages.reference import pack_reference, unpack_reference
from isthmus.kernels.pages.rotation import Rotations, build_rotations
from isthmus.kernels.pages.unpack_triton import unpack

# The interpreter computes lanes that are masked off, infinities among them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CPU = torch.device("cpu")
BITS = ((4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
HEAD_DIMS = (16, 64, 80, 96, 128, 192, 256)


def make(bits: tuple[int, int], dim: int, page: int, heads: int) -> tuple[PageLayout, Rotations]:
    layout = PageLayout(head_dim=dim, page_tokens=page, key_bits=bits[0], value_bits=bits[1])
    return layout, build_rotations(torch.rand(heads, dim) + 0.5, CPU)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))


def key_value(tokens: int, heads: int, dim: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    k_THD, v_THD = torch.randn(tokens, heads, dim) + 2 * torch.randn(heads, dim), torch.randn(tokens, heads, dim)
    return k_THD / 12 * size, v_THD / 12 * size


def check_pack(bits: tuple[int, int], dim: int, page: int, size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout, rotations = make(bits, dim, page, 2)
    k_THD, v_THD = (x.to(dtype) for x in key_value(3 * page + 5, 2, dim, size))
    rows, slots = torch.tensor([5, 5 + 2 * page]), torch.tensor([3, 0])
    pool = torch.full((4, 2 * layout.head_bytes), 0xAB, dtype=torch.uint8)
    padding = pack_reference(k_THD[:page] * 0, v_THD[:page] * 0, rotations, layout)
    pool[slots] = padding
    pack(k_THD, v_THD, rows, rotations, layout, pool, slots)
    assert bool((pool[[1, 2]] == 0xAB).all())
    pages = torch.cat([torch.arange(row, row + page) for row in rows.tolist()])
    wanted = pack_reference(k_THD[pages], v_THD[pages], rotations, layout)
    assert float((pool[slots] != wanted).float().mean()) < 0.01
    decoded = [unpack_reference(p, rotations, layout, torch.float32) for p in (pool[slots], wanted)]
    for got, reference in zip(*decoded, strict=True):
        assert error(got, reference) < 0.03


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", ((4, 2), (3, 4), (2, 3)))
def test_pack(bits: tuple[int, int], dim: int):
    check_pack(bits, dim, 16, 1.0, torch.float32)


@pytest.mark.parametrize("size", (0.0, 1e-37, 1e-20, 1e20, 3e38))
def test_pack_extremes(size: float):
    check_pack((4, 3), 16, 8, size, torch.float32)


@pytest.mark.parametrize("page", (8, 24, 64))
def test_pack_page_sizes_and_bf16(page: int):
    check_pack((3, 4), 16, page, 1.0, torch.bfloat16)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", ((4, 2), (3, 4), (2, 3)))
def test_unpack(bits: tuple[int, int], dim: int):
    torch.manual_seed(0)
    layout, rotations = make(bits, dim, 16, 3)
    packed = pack_reference(*key_value(32, 3, dim), rotations, layout)
    wanted = unpack_reference(packed, rotations, layout, torch.float32)
    for got, reference in zip(unpack(packed, rotations, layout, torch.float32), wanted, strict=True):
        assert error(got, reference) < 1e-6


# Subnormal bf16 is left out: the interpreter's conversion to it is wrong.
@pytest.mark.parametrize("size", (0.0, 1e-30, 1e37, 3e38))
def test_unpack_extremes_into_bf16(size: float):
    torch.manual_seed(0)
    layout, rotations = make((3, 2), 16, 24, 1)
    packed = pack_reference(*key_value(24, 1, 16, size), rotations, layout)
    wanted = unpack_reference(packed, rotations, layout, torch.bfloat16)
    for got, reference in zip(unpack(packed, rotations, layout, torch.bfloat16), wanted, strict=True):
        assert bool(got.isfinite().all())
        assert error(got, reference) < 0.01


def make_kv(
    bits: tuple[int, int], dim: int, page: int, heads: int, queries: int, lengths: list[int]
) -> tuple[PagedKV, Rotations]:
    """Sequences whose first page, last full page and partial page are raw; what no token has written is NaN."""
    layout, rotations = make(bits, dim, page, heads)
    pages = max(-(-length // page) for length in lengths) + 1
    slots = len(lengths) * pages
    table_BN = torch.randperm(slots).view(len(lengths), pages).int()
    raw = [torch.randn(slots, page, heads, dim).bfloat16() for _ in range(2)]
    for row, length in zip(table_BN, lengths, strict=True):
        for pool in raw:
            pool[row[length // page], length % page :] = float("nan")
            pool[row[length // page + 1 :]] = float("nan")
    ends = [max(1, min(length // page - 1, (length - queries) // page)) for length in lengths]
    tokens = slots * page
    kv = PagedKV(
        raw_k_RPHD=raw[0],
        raw_v_RPHD=raw[1],
        packed_SB=pack_reference(*(12 * x for x in key_value(tokens, heads, dim)), rotations, layout),
        table_BN=table_BN,
        packed_from_B=torch.ones(len(lengths), dtype=torch.int32),
        packed_to_B=torch.tensor(ends, dtype=torch.int32),
        lengths_B=torch.tensor(lengths, dtype=torch.int32),
        layout=layout,
    )
    return kv, rotations


CASES = [
    # bits, D, P, KV heads, group, queries, lengths, window, splits
    ((4, 4), 64, 16, 2, 3, 1, [70, 17, 5, 1], None, 2),
    ((4, 3), 80, 8, 1, 8, 2, [40, 41], 20, 3),
    ((4, 2), 96, 32, 1, 5, 8, [130, 9], None, 1),
    ((3, 3), 128, 16, 1, 1, 4, [64, 65], 33, 2),
    ((3, 2), 192, 16, 1, 7, 1, [100], None, 4),
    ((2, 2), 256, 8, 1, 2, 3, [33, 24], 7, 2),
    ((4, 4), 16, 24, 3, 4, 1, [24, 120], 1, 2),
    ((3, 4), 8, 8, 2, 6, 8, [100, 8], 90, 40),
    ((2, 3), 64, 64, 1, 2, 1, [200], 64, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_paged_attention(case: tuple):
    bits, dim, page, heads, group, queries, lengths, window, splits = case
    torch.manual_seed(0)
    kv, rotations = make_kv(bits, dim, page, heads, queries, lengths)
    q_BQHD = torch.randn(len(lengths), queries, heads * group, dim)
    got, got_lse = paged_attention(q_BQHD, kv, rotations, dim**-0.5, window, splits)
    wanted, wanted_lse = paged_attention_reference(q_BQHD, kv, rotations, dim**-0.5, window)
    assert error(got, wanted) < 0.008  # queries and weights are bf16
    assert float((got_lse - wanted_lse).abs().max()) < 0.03


def test_reference_is_unpack_and_dense_attention():
    torch.manual_seed(0)
    kv, rotations = make_kv((4, 4), 64, 16, 2, 3, [90])
    q_BQHD = torch.randn(1, 3, 4, 64)
    out, _ = paged_attention_reference(q_BQHD, kv, rotations, 0.125)
    k_THD, v_THD = gather_sequence(kv, rotations, 0)
    mask = torch.ones(3, 90, dtype=torch.bool).tril(87)
    q, k, v = (x.transpose(0, 1) for x in (q_BQHD[0], k_THD.repeat_interleave(2, 1), v_THD.repeat_interleave(2, 1)))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    assert error(out[0], dense.transpose(0, 1)) < 1e-5


def test_wrappers_refuse_what_does_not_fit():
    kv, rotations = make_kv((4, 4), 64, 16, 2, 1, [40])
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(torch.randn(1, 9, 4, 64), kv, rotations, 1.0)
    with pytest.raises(ValueError, match="different numbers of sequences"):
        paged_attention(torch.randn(2, 1, 4, 64), kv, rotations, 1.0)
    with pytest.raises(ValueError, match="do not hold"):
        unpack(torch.zeros(1, 100, dtype=torch.uint8), rotations, kv.layout, torch.float32)


def test_the_kernels_are_tried_before_they_are_used() -> None:
    assert triton_works(CPU)
    assert not has_triton(CPU), "the interpreter is for tests"
