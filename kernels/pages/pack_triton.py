"""Finished pages -> packed pages, in Triton, one launch for a layer. Reference: `reference.py`;
formats: `layout.py`.

One program for each page, KV head and kind (keys, values). Rotation: x · signs / balance is split into two
bf16 numbers (16 bits of mantissa), whose products with ±1 are exact, so that tensor cores do it with fp32
sums. Powers of two are taken out first, so that no finite page overflows. A rotated value that lies within
rounding of a threshold may get the neighbouring code of what the reference gives it; everything else is the
same.
"""

# Triton's language is typed for its compiler, not for a checker of Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codebook import centroids, unit
from .dequant_triton import dot_bf16
from .layout import PageLayout
from .rotation import Rotations
from .unpack_triton import current, hadamard_bf16, uses_asm

_BF16_MAX = tl.constexpr(3.3895313892515355e38)
_NO_NORM = tl.constexpr(1e-30)


@triton.jit
def _power_of_two(largest):
    """(2^-e, 2^e) with 2^e near `largest`, both normal numbers."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _bf16_bits(x):
    """The upper half of float32 after rounding to nearest even, int32: the same in the interpreter, which truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _scale16(scale):
    """int16 bits of `scale16` (`layout.py`)."""
    scale = tl.minimum(scale, _BF16_MAX)
    usual = ((scale >= 0.00006103515625) & (scale <= 65504.0)) | (scale == 0.0)
    half = tl.where(usual, scale, 0.0).to(tl.float16).to(tl.int16, bitcast=True)
    wide = _bf16_bits(scale) - 32768
    return tl.where(usual, half, wide.to(tl.int16))


@triton.jit
def _split(x, gain):
    """x · gain as the sum of two bf16 numbers."""
    scaled = x * gain
    high = scaled.to(tl.bfloat16)
    return high, (scaled - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _code(z, steps, LOWEST: tl.constexpr, COUNT: tl.constexpr):
    """Codes (int32) and centroids of rotated values in centroid units; steps: COUNT pairs (midpoint, gap)."""
    code = tl.zeros(z.shape, tl.int32)
    centroid = tl.zeros(z.shape, tl.float32) + LOWEST
    for i in tl.static_range(COUNT):
        above = z >= tl.load(steps + 2 * i)
        code += above.to(tl.int32)
        centroid += tl.where(above, tl.load(steps + 2 * i + 1), 0.0)
    return code, centroid


@triton.jit
def _rotated_keys(
    high, low, hadamard_ptr, block, up, down,
    DIM: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, ROOT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Columns block * WIDTH ... of the rotated keys, less their mean: [P, width], and the mean as it is
    stored."""
    dims, columns = tl.arange(0, DIM_PAD), tl.arange(0, WIDTH_PAD)
    mask = (dims < DIM)[:, None] & (columns < WIDTH)[None, :]
    rotation = tl.load(hadamard_ptr + (block * WIDTH + columns)[None, :] * DIM + dims[:, None], mask=mask, other=0.0)
    y = dot_bf16(low, rotation, tl.zeros([PAGE_PAD, WIDTH_PAD], tl.float32), NATIVE)
    y = dot_bf16(high, rotation, y, NATIVE) * ROOT
    mean = tl.sum(y, 0) * (1.0 / PAGE) * up
    mean = _bf16_bits(tl.minimum(tl.maximum(mean, -_BF16_MAX), _BF16_MAX))
    tokens = tl.arange(0, PAGE_PAD)
    y = y - ((mean << 16).to(tl.float32, bitcast=True) * down)[None, :]
    return tl.where((tokens < PAGE)[:, None] & (columns < WIDTH)[None, :], y, 0.0), mean


@triton.jit
def _pack_keys(
    x_ptr, x_stride, out, gain, hadamard_ptr, steps,
    DIM: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, LOWEST: tl.constexpr,
    SCALE_AT: tl.constexpr, MEAN_AT: tl.constexpr,
    DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, ROOT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # At 3 bits the blocks are eighths, because a byte of the high plane joins columns an eighth apart.
    BLOCKS: tl.constexpr = 2 if BITS == 4 else (4 if BITS == 2 else 8)
    WIDTH: tl.constexpr = DIM // BLOCKS
    WIDTH_PAD: tl.constexpr = max(16, DIM_PAD // BLOCKS)
    tokens, dims, columns = tl.arange(0, PAGE_PAD), tl.arange(0, DIM_PAD), tl.arange(0, WIDTH_PAD)
    mask = (tokens < PAGE)[:, None] & (dims < DIM)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * x_stride + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    down, up = _power_of_two(tl.max(tl.max(tl.abs(x), 1), 0))
    high, low = _split(x * down, tl.load(gain + dims, mask=dims < DIM, other=0.0)[None, :])
    norm2 = tl.zeros([PAGE_PAD], tl.float32)
    for block in tl.static_range(BLOCKS):
        y, mean = _rotated_keys(
            high, low, hadamard_ptr, block, up, down,
            DIM, PAGE, WIDTH, WIDTH_PAD, DIM_PAD, PAGE_PAD, ROOT, NATIVE,
        )  # fmt: skip
        norm2 += tl.sum(y * y, 1)
        at = (out + MEAN_AT).to(tl.pointer_type(tl.int16)) + block * WIDTH + columns
        tl.store(at, mean.to(tl.int16), mask=columns < WIDTH)
    norm = tl.sqrt(norm2)
    to_unit = UNIT / (ROOT * tl.maximum(norm, _NO_NORM))
    square = tl.zeros([PAGE_PAD], tl.float32)
    byte0 = tl.zeros([PAGE_PAD, WIDTH_PAD], tl.int32)
    byte1 = tl.zeros([PAGE_PAD, WIDTH_PAD], tl.int32)
    byte2 = tl.zeros([PAGE_PAD, WIDTH_PAD], tl.int32)
    for block in tl.static_range(BLOCKS):
        # Rotating again costs less than keeping all blocks in registers.
        y, mean = _rotated_keys(
            high, low, hadamard_ptr, block, up, down,
            DIM, PAGE, WIDTH, WIDTH_PAD, DIM_PAD, PAGE_PAD, ROOT, NATIVE,
        )  # fmt: skip
        code, centroid = _code(y * to_unit[:, None], steps, LOWEST, (1 << BITS) - 1)
        square += tl.sum(tl.where((columns < WIDTH)[None, :], centroid * centroid, 0.0), 1)
        if BITS == 3:
            if block % 2 == 0:
                byte0 += (code & 3) << block
            else:
                byte1 += (code & 3) << (block - 1)
            byte2 += (code >> 2) << (block // 2 + 4 * (block % 2))
        else:
            byte0 += code << (BITS * block)
    stored = (tokens < PAGE)[:, None] & (columns < WIDTH)[None, :]
    ROW: tl.constexpr = 2 * WIDTH if BITS == 3 else WIDTH
    tl.store(out + tokens[:, None] * ROW + columns[None, :], byte0.to(tl.uint8), mask=stored)
    if BITS == 3:
        tl.store(out + tokens[:, None] * ROW + WIDTH + columns[None, :], byte1.to(tl.uint8), mask=stored)
        tl.store(out + PAGE * ROW + tokens[:, None] * WIDTH + columns[None, :], byte2.to(tl.uint8), mask=stored)
    bits = _scale16(norm / tl.sqrt(square) * up)
    tl.store((out + SCALE_AT).to(tl.pointer_type(tl.int16)) + tokens, bits, mask=tokens < PAGE)


@triton.jit
def _pack_values(
    x_ptr, x_stride, out, gain, hadamard_ptr, steps,
    DIM: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, LOWEST: tl.constexpr,
    CODES_AT: tl.constexpr, SCALE_AT: tl.constexpr,
    DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, ROOT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = 2 if BITS == 4 else (4 if BITS == 2 else 8)
    WIDTH: tl.constexpr = PAGE // BLOCKS
    WIDTH_PAD: tl.constexpr = max(16, PAGE_PAD // BLOCKS)
    all_tokens, dims, columns = tl.arange(0, PAGE_PAD), tl.arange(0, DIM_PAD), tl.arange(0, WIDTH_PAD)
    mask = (all_tokens < PAGE)[:, None] & (dims < DIM)[None, :]
    page = tl.load(x_ptr + all_tokens[:, None] * x_stride + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    down, up = _power_of_two(tl.max(tl.max(tl.abs(page), 1), 0))
    g = tl.load(gain + dims, mask=dims < DIM, other=0.0)[:, None]
    square_mask = (dims < DIM)[:, None] & (dims < DIM)[None, :]
    rotation = tl.load(hadamard_ptr + dims[:, None] * DIM + dims[None, :], mask=square_mask, other=0.0)
    byte0 = tl.zeros([DIM_PAD, WIDTH_PAD], tl.int32)
    byte1 = tl.zeros([DIM_PAD, WIDTH_PAD], tl.int32)
    byte2 = tl.zeros([DIM_PAD, WIDTH_PAD], tl.int32)
    for block in tl.static_range(BLOCKS):
        tokens = block * WIDTH + columns
        mask = (dims < DIM)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(x_ptr + tokens[None, :] * x_stride + dims[:, None], mask=mask, other=0.0).to(tl.float32)
        high, low = _split(x * down, g)
        y = dot_bf16(rotation, low, tl.zeros([DIM_PAD, WIDTH_PAD], tl.float32), NATIVE)
        y = dot_bf16(rotation, high, y, NATIVE) * ROOT
        norm = tl.sqrt(tl.sum(y * y, 0))
        to_unit = UNIT / (ROOT * tl.maximum(norm, _NO_NORM))
        code, centroid = _code(y * to_unit[None, :], steps, LOWEST, (1 << BITS) - 1)
        square = tl.sum(tl.where((dims < DIM)[:, None], centroid * centroid, 0.0), 0)
        bits = _scale16(norm / tl.sqrt(square) * up)
        tl.store((out + SCALE_AT).to(tl.pointer_type(tl.int16)) + tokens, bits, mask=columns < WIDTH)
        if BITS == 3:
            if block % 2 == 0:
                byte0 += (code & 3) << block
            else:
                byte1 += (code & 3) << (block - 1)
            byte2 += (code >> 2) << (block // 2 + 4 * (block % 2))
        else:
            byte0 += code << (BITS * block)
    mask = (dims < DIM)[:, None] & (columns < WIDTH)[None, :]
    ROW: tl.constexpr = 2 * WIDTH if BITS == 3 else WIDTH
    codes = out + CODES_AT
    tl.store(codes + dims[:, None] * ROW + columns[None, :], byte0.to(tl.uint8), mask=mask)
    if BITS == 3:
        tl.store(codes + dims[:, None] * ROW + WIDTH + columns[None, :], byte1.to(tl.uint8), mask=mask)
        tl.store(codes + DIM * ROW + dims[:, None] * WIDTH + columns[None, :], byte2.to(tl.uint8), mask=mask)


@triton.jit
def pack_kernel(
    k, v, k_stride, v_stride, starts, slots, out, key_gain, value_gain, hadamard_ptr, key_steps, value_steps,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, KEY_LOWEST: tl.constexpr, VALUE_LOWEST: tl.constexpr,
    HEAD_BYTES: tl.constexpr, CODES_VALUE: tl.constexpr, SCALE_KEY: tl.constexpr, SCALE_VALUE: tl.constexpr,
    MEAN_KEY: tl.constexpr, DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, ROOT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (pages, heads, 2). starts: first token of each page; slots: where it goes."""
    head = tl.program_id(1)
    start, slot = tl.load(starts + tl.program_id(0)), tl.load(slots + tl.program_id(0))
    base = out + (slot * HEADS + head) * HEAD_BYTES
    if tl.program_id(2) == 0:
        _pack_keys(
            k + start * k_stride + head * DIM, k_stride, base, key_gain + head * DIM, hadamard_ptr, key_steps,
            DIM, PAGE, KEY_BITS, KEY_UNIT, KEY_LOWEST, SCALE_KEY, MEAN_KEY, DIM_PAD, PAGE_PAD, ROOT, NATIVE,
        )  # fmt: skip
    else:
        _pack_values(
            v + start * v_stride + head * DIM, v_stride, base, value_gain, hadamard_ptr, value_steps,
            DIM, PAGE, VALUE_BITS, VALUE_UNIT, VALUE_LOWEST, CODES_VALUE, SCALE_VALUE, DIM_PAD, PAGE_PAD, ROOT, NATIVE,
        )  # fmt: skip


def pack(
    k_THD: Tensor, v_THD: Tensor, starts_N: Tensor, rotations: Rotations,
    layout: PageLayout, out_SB: Tensor, slots_N: Tensor,
) -> None:  # fmt: skip
    """Packs pages of finite keys and values straight from a pool of tokens into slots of a pool of packed pages.

    k_THD, v_THD: any float dtype, each token's [H, D] contiguous, tokens at any stride. starts_N: int64, the first
    token of each page; the page is starts_N[i] ... + page_tokens. out_SB: uint8 [slots, H * head_bytes] contiguous;
    slots_N: int64, the slot of each page.
    """
    heads, dim = rotations.key_weight_HD.shape
    for x_THD in (k_THD, v_THD):
        if x_THD.shape[1:] != (heads, dim) or x_THD.stride()[1:] != (dim, 1):
            raise ValueError(
                f"pages of shape {tuple(x_THD.shape)}, strides {x_THD.stride()}; wanted [T, {heads}, {dim}]"
            )
    if out_SB.shape[1] != heads * layout.head_bytes or not out_SB.is_contiguous():
        raise ValueError(f"packed pool {tuple(out_SB.shape)} does not hold {heads} heads of {layout}")
    if len(starts_N) == 0:
        return
    device = k_THD.device
    with current(device):
        pack_kernel[(len(starts_N), heads, 2)](
            k_THD, v_THD, k_THD.stride(0), v_THD.stride(0), starts_N, slots_N, out_SB,
            rotations.key_weight_HD, rotations.value_weight_D,
            hadamard_bf16(dim, device), _steps(layout.key_bits, device), _steps(layout.value_bits, device),
            heads, dim, layout.page_tokens, layout.key_bits, layout.value_bits,
            unit(layout.key_bits), unit(layout.value_bits),
            centroids(layout.key_bits)[0], centroids(layout.value_bits)[0],
            layout.head_bytes, layout.codes_value, layout.scale_key, layout.scale_value,
            layout.mean_key, triton.next_power_of_2(max(16, dim)),
            triton.next_power_of_2(max(16, layout.page_tokens)), dim**-0.5, uses_asm(device),
            num_warps=8 if dim > 128 else 4,
        )  # fmt: skip


@cache
def _steps(bits: int, device: torch.device) -> Tensor:
    """float32 [2^bits - 1, 2]: midpoint between a centroid and the next, and the gap between them."""
    points = torch.tensor(centroids(bits), dtype=torch.float32, device=device)
    return torch.stack([(points[1:] + points[:-1]) / 2, points[1:] - points[:-1]], 1).contiguous()
