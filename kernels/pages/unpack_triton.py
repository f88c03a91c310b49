"""Packed pages -> dense keys and values, in Triton. Reference: `reference.py`; formats: `layout.py`.

One program for each page, KV head and kind. Rotating integer centroids by ±1 is exact in bf16 products with
fp32 sums, so the only rounding is that of scale · sum + mean.
"""

# Triton's language is typed for its compiler, not for a checker of Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dequant_triton import POINT_OFFSET, dot_bf16, load_nibbles, load_scale16, point_table, points2, points3, points4
from .layout import PageLayout
from .rotation import Rotations, hadamard

_MEAN_SHIFT = tl.constexpr(2.0**-16)  # keeps sums of huge means finite until they are clamped


@triton.jit
def _rotate_add(
    acc, points, hadamard_ptr, group, dims,
    DIM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [P, D] += points [P, width] · H[group's rows], all exact."""
    rows = tl.arange(0, WIDTH_PAD)
    mask = (rows < WIDTH)[:, None] & (dims < DIM)[None, :]
    block = tl.load(hadamard_ptr + (group * WIDTH + rows)[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    centroids = (2.0 * points.to(tl.float32) - POINT_OFFSET).to(tl.bfloat16)
    return dot_bf16(centroids, block, acc, ASM)


@triton.jit
def _keys(
    head, gain, hadamard_ptr, table, out, out_stride,
    DIM: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, SCALE_AT: tl.constexpr, MEAN_AT: tl.constexpr,
    LIMIT: tl.constexpr, DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = 2 if BITS == 4 else 4
    WIDTH: tl.constexpr = DIM // GROUPS
    WIDTH_PAD: tl.constexpr = max(16, DIM_PAD // GROUPS)
    tokens, dims, columns = tl.arange(0, PAGE_PAD), tl.arange(0, DIM_PAD), tl.arange(0, WIDTH_PAD)
    mask = (tokens < PAGE)[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(head + tokens[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
    acc = tl.zeros([PAGE_PAD, DIM_PAD], tl.float32)
    if BITS == 4:
        p0, p1 = points4(x, table, ASM)
        acc = _rotate_add(acc, p0, hadamard_ptr, 0, dims, DIM, WIDTH, WIDTH_PAD, ASM)
        acc = _rotate_add(acc, p1, hadamard_ptr, 1, dims, DIM, WIDTH, WIDTH_PAD, ASM)
    else:
        if BITS == 3:
            h = load_nibbles(head + PAGE * WIDTH, tokens[:, None], columns[None, :], WIDTH, mask)
            p0, p1, p2, p3 = points3(x, h, table, ASM)
        else:
            p0, p1, p2, p3 = points2(x, table, ASM)
        acc = _rotate_add(acc, p0, hadamard_ptr, 0, dims, DIM, WIDTH, WIDTH_PAD, ASM)
        acc = _rotate_add(acc, p1, hadamard_ptr, 1, dims, DIM, WIDTH, WIDTH_PAD, ASM)
        acc = _rotate_add(acc, p2, hadamard_ptr, 2, dims, DIM, WIDTH, WIDTH_PAD, ASM)
        acc = _rotate_add(acc, p3, hadamard_ptr, 3, dims, DIM, WIDTH, WIDTH_PAD, ASM)
    scale = load_scale16((head + SCALE_AT).to(tl.pointer_type(tl.int16)) + tokens, tokens < PAGE)
    g = tl.load(gain + dims, mask=dims < DIM, other=0.0)
    # The mean is one row: 16 copies of it make a product of matrices. A block of the rotation at a time fits anywhere.
    rotated = tl.zeros([16, DIM_PAD], tl.float32)
    block = tl.arange(0, BLOCK)
    for start in range(0, DIM_PAD, BLOCK):
        inner = start + block
        mean = tl.load((head + MEAN_AT).to(tl.pointer_type(tl.bfloat16)) + inner, mask=inner < DIM, other=0.0)
        rows = (tl.zeros([16, BLOCK], tl.float32) + (mean.to(tl.float32) * _MEAN_SHIFT)[None, :]).to(tl.bfloat16)
        square = (inner < DIM)[:, None] & (dims < DIM)[None, :]
        part = tl.load(hadamard_ptr + inner[:, None] * DIM + dims[None, :], mask=square, other=0.0)
        rotated = dot_bf16(rows, part, rotated, ASM)
    mean_x = tl.max(rotated, 0) * g / _MEAN_SHIFT
    mean_x = tl.minimum(tl.maximum(mean_x, -LIMIT), LIMIT)
    y = tl.minimum(tl.maximum(acc * g[None, :] * scale[:, None], -LIMIT), LIMIT) + mean_x[None, :]
    y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
    stored = (tokens < PAGE)[:, None] & (dims < DIM)[None, :]
    tl.store(out + tokens[:, None] * out_stride + dims[None, :], y.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _value_part(
    points, group, head, gain, hadamard_ptr, out, out_stride,
    DIM: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    SCALE_AT: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Tokens group * WIDTH ... of a page, from points [width, D]; a block of the rotation's columns at a time."""
    dims, columns, block = tl.arange(0, DIM_PAD), tl.arange(0, WIDTH_PAD), tl.arange(0, BLOCK)
    centroids = (2.0 * points.to(tl.float32) - POINT_OFFSET).to(tl.bfloat16)
    tokens = group * WIDTH + columns
    scale = load_scale16((head + SCALE_AT).to(tl.pointer_type(tl.int16)) + tokens, columns < WIDTH)
    for start in range(0, DIM_PAD, BLOCK):
        outer = start + block
        square = (dims < DIM)[:, None] & (outer < DIM)[None, :]
        part = tl.load(hadamard_ptr + dims[:, None] * DIM + outer[None, :], mask=square, other=0.0)
        g = tl.load(gain + outer, mask=outer < DIM, other=0.0)
        y = dot_bf16(centroids, part, tl.zeros([WIDTH_PAD, BLOCK], tl.float32), ASM) * g[None, :] * scale[:, None]
        y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
        stored = (columns < WIDTH)[:, None] & (outer < DIM)[None, :]
        tl.store(out + tokens[:, None] * out_stride + outer[None, :], y.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _values(
    head, gain, hadamard_ptr, table, out, out_stride,
    DIM: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, CODES_AT: tl.constexpr, SCALE_AT: tl.constexpr,
    LIMIT: tl.constexpr, DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = 2 if BITS == 4 else 4
    WIDTH: tl.constexpr = PAGE // GROUPS
    WIDTH_PAD: tl.constexpr = max(16, PAGE_PAD // GROUPS)
    dims, columns = tl.arange(0, DIM_PAD), tl.arange(0, WIDTH_PAD)
    # One column of bytes for each dimension: tokens are contiguous in memory.
    mask = (columns < WIDTH)[:, None] & (dims < DIM)[None, :]
    codes = head + CODES_AT
    x = tl.load(codes + dims[None, :] * WIDTH + columns[:, None], mask=mask, other=0)
    if BITS == 4:
        p0, p1 = points4(x, table, ASM)
        _value_part(
            p0,
            0,
            head,
            gain,
            hadamard_ptr,
            out,
            out_stride,
            DIM,
            PAGE,
            WIDTH,
            WIDTH_PAD,
            DIM_PAD,
            SCALE_AT,
            LIMIT,
            BLOCK,
            ASM,
        )
        _value_part(
            p1,
            1,
            head,
            gain,
            hadamard_ptr,
            out,
            out_stride,
            DIM,
            PAGE,
            WIDTH,
            WIDTH_PAD,
            DIM_PAD,
            SCALE_AT,
            LIMIT,
            BLOCK,
            ASM,
        )
    else:
        if BITS == 3:
            h = load_nibbles(codes + DIM * WIDTH, dims[None, :], columns[:, None], WIDTH, mask)
            p0, p1, p2, p3 = points3(x, h, table, ASM)
        else:
            p0, p1, p2, p3 = points2(x, table, ASM)
        _value_part(
            p0,
            0,
            head,
            gain,
            hadamard_ptr,
            out,
            out_stride,
            DIM,
            PAGE,
            WIDTH,
            WIDTH_PAD,
            DIM_PAD,
            SCALE_AT,
            LIMIT,
            BLOCK,
            ASM,
        )
        _value_part(
            p1,
            1,
            head,
            gain,
            hadamard_ptr,
            out,
            out_stride,
            DIM,
            PAGE,
            WIDTH,
            WIDTH_PAD,
            DIM_PAD,
            SCALE_AT,
            LIMIT,
            BLOCK,
            ASM,
        )
        _value_part(
            p2,
            2,
            head,
            gain,
            hadamard_ptr,
            out,
            out_stride,
            DIM,
            PAGE,
            WIDTH,
            WIDTH_PAD,
            DIM_PAD,
            SCALE_AT,
            LIMIT,
            BLOCK,
            ASM,
        )
        _value_part(
            p3,
            3,
            head,
            gain,
            hadamard_ptr,
            out,
            out_stride,
            DIM,
            PAGE,
            WIDTH,
            WIDTH_PAD,
            DIM_PAD,
            SCALE_AT,
            LIMIT,
            BLOCK,
            ASM,
        )


@triton.jit
def unpack_kernel(
    packed, k_out, v_out, key_gain, value_gain, hadamard_ptr, key_table, value_table,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    HEAD_BYTES: tl.constexpr, CODES_VALUE: tl.constexpr, SCALE_KEY: tl.constexpr, SCALE_VALUE: tl.constexpr,
    MEAN_KEY: tl.constexpr, LIMIT: tl.constexpr, DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, BLOCK: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Grid (pages, heads, 2)."""
    page, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    base = packed + (page * HEADS + head) * HEAD_BYTES
    offset = (page * PAGE * HEADS + head) * DIM
    if tl.program_id(2) == 0:
        _keys(
            base, key_gain + head * DIM, hadamard_ptr, key_table, k_out + offset, HEADS * DIM,
            DIM, PAGE, KEY_BITS, SCALE_KEY, MEAN_KEY, LIMIT, DIM_PAD, PAGE_PAD, BLOCK, ASM,
        )  # fmt: skip
    else:
        _values(
            base, value_gain, hadamard_ptr, value_table, v_out + offset, HEADS * DIM,
            DIM, PAGE, VALUE_BITS, CODES_VALUE, SCALE_VALUE, LIMIT, DIM_PAD, PAGE_PAD, BLOCK, ASM,
        )  # fmt: skip


def unpack(packed_NB: Tensor, rotations: Rotations, layout: PageLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H, D] of packed pages uint8 [pages, H * head_bytes], contiguous."""
    pages, heads, dim = packed_NB.shape[0], rotations.key_gain_HD.shape[0], layout.head_dim
    if packed_NB.shape[1] != heads * layout.head_bytes or not packed_NB.is_contiguous():
        raise ValueError(f"packed pages {tuple(packed_NB.shape)} do not hold {heads} heads of {layout}")
    device = packed_NB.device
    k_THD = torch.empty(pages * layout.page_tokens, heads, dim, dtype=dtype, device=device)
    v_THD = torch.empty_like(k_THD)
    if pages == 0:
        return k_THD, v_THD
    dim_pad = triton.next_power_of_2(max(16, dim))
    with current(device):
        unpack_kernel[(pages, heads, 2)](
            packed_NB, k_THD, v_THD, rotations.key_gain_HD, rotations.value_gain_D, hadamard_bf16(dim, device),
            point_table(layout.key_bits, device), point_table(layout.value_bits, device),
            heads, dim, layout.page_tokens, layout.key_bits, layout.value_bits,
            layout.head_bytes, layout.codes_value, layout.scale_key, layout.scale_value,
            layout.mean_key, torch.finfo(dtype).max, dim_pad, triton.next_power_of_2(max(16, layout.page_tokens)),
            min(64, dim_pad), uses_asm(device),
            num_warps=8 if dim > 128 else 4,
        )  # fmt: skip
    return k_THD, v_THD


@cache
def hadamard_bf16(dim: int, device: torch.device) -> Tensor:
    """±1 as bf16 [D, D]."""
    return hadamard(dim).to(device=device, dtype=torch.bfloat16)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that kernels are launched on: Triton launches on the current one, not on that of the data."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def uses_asm(device: torch.device) -> bool:
    """Whether kernels may use PTX: on NVIDIA GPUs, not in the interpreter."""
    return device.type == "cuda" and torch.version.cuda is not None
