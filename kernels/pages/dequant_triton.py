"""Codes -> bf16 numbers inside of Triton kernels, a byte at a time.

A centroid is c = 2 v - 127 with v of 7 bits (`codebook.py`), and bf16 has 7 bits of mantissa: the bits
0x4300 | v are the number 128 + v. The functions below return these; what is linear in them (a dot product)
is corrected once, sum(a · c) = 2 sum(a · (128 + v)) - 383 sum(a).

On NVIDIA GPUs the table is two registers and a look-up is PTX `prmt` (permute bytes): each nibble of the
selector picks one of 8 bytes, or, where its top bit is set, repeats that byte's sign, which is 0 for v.
Instructions for each code: 1.6 at 4 bits, 1.0 at 2 bits, 1.8 at 3 bits. Elsewhere, and in Triton's
interpreter, the table is read from memory.
"""

# Triton's language is typed for its compiler, not for a checker of Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false

from functools import cache

import torch
import triton
import triton.language as tl

from .codebook import centroids

POINT_OFFSET = tl.constexpr(383.0)
_EVEN, _ODD = "0x4240", "0x4341"  # selectors: bytes 0 and 2, or 1 and 3, each below a byte 0x43


@cache
def point_table(bits: int, device: torch.device) -> torch.Tensor:
    """bf16 [2^bits]: 128 + v by code."""
    return torch.tensor([128 + (c + 127) // 2 for c in centroids(bits)], dtype=torch.bfloat16, device=device)


def _words(bits: int) -> list[str]:
    """The v of all codes, four to a 32-bit word, the first lowest; padded with zeros to two words."""
    v = [(c + 127) // 2 for c in centroids(bits)] + [0] * 8
    return [hex(sum(byte << 8 * i for i, byte in enumerate(v[at : at + 4]))) for at in range(0, max(8, 1 << bits), 4)]


def _asm(lines: list[str], registers: str) -> str:
    return "{ .reg .b32 " + registers + "; " + " ".join(line + ";" for line in lines) + " }"


def _asm4() -> str:
    w = _words(4)
    look = [
        *("xor.b32 y, $4, 0x88888888", "shr.b32 s, $4, 16", "shr.b32 t, y, 16"),
        *(f"prmt.b32 p, {w[0]}, {w[1]}, $4", f"prmt.b32 n, {w[2]}, {w[3]}, y", "or.b32 a, p, n"),
        *(f"prmt.b32 p, {w[0]}, {w[1]}, s", f"prmt.b32 n, {w[2]}, {w[3]}, t", "or.b32 b, p, n"),
    ]
    spread = [f"prmt.b32 ${i}, {'ab'[i % 2]}, 0x43, {(_EVEN, _ODD)[i // 2]}" for i in range(4)]
    return _asm(look + spread, "y, s, t, p, n, a, b")


def _asm2or3(bits: int) -> str:
    """Selectors: codes of groups 0 and 2 in the nibbles of e, of groups 1 and 3 in those of o."""
    w, x, h = _words(bits), "$8", "$9"
    select = [f"and.b32 e, {x}, 0x33333333", f"shr.b32 o, {x}, 2", "and.b32 o, o, 0x33333333"]
    if bits == 3:
        select += [
            *(f"and.b32 s, {h}, 0x01010101", "shl.b32 s, s, 2", "or.b32 e, e, s"),
            *(f"and.b32 s, {h}, 0x04040404", "shl.b32 s, s, 4", "or.b32 e, e, s"),
            *(f"and.b32 s, {h}, 0x02020202", "shl.b32 s, s, 1", "or.b32 o, o, s"),
            *(f"and.b32 s, {h}, 0x08080808", "shl.b32 s, s, 3", "or.b32 o, o, s"),
        ]
    look = []
    for groups, source in ((0, "e"), (1, "o")):
        look += [f"prmt.b32 a, {w[0]}, {w[1]}, {source}", f"shr.b32 s, {source}, 16"]
        look += [f"prmt.b32 b, {w[0]}, {w[1]}, s"]
        for group, selector in ((groups, _EVEN), (groups + 2, _ODD)):
            look += [f"prmt.b32 ${2 * group}, a, 0x43, {selector}", f"prmt.b32 ${2 * group + 1}, b, 0x43, {selector}"]
    return _asm(select + look, "e, o, s, a, b")


ASM_2 = tl.constexpr(_asm2or3(2))
ASM_3 = tl.constexpr(_asm2or3(3))
ASM_4 = tl.constexpr(_asm4())


@triton.jit
def points4(x, table, ASM: tl.constexpr):
    """Groups 0 and 1 of bytes of two 4-bit codes."""
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_4, "=r,=r,=r,=r,r", [x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return tl.load(table + (x & 15)), tl.load(table + (x >> 4))


@triton.jit
def points2(x, table, ASM: tl.constexpr):
    """Groups 0 to 3 of bytes of four 2-bit codes."""
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_2,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [x],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        p0, p1 = tl.load(table + (x & 3)), tl.load(table + ((x >> 2) & 3))
        return p0, p1, tl.load(table + ((x >> 4) & 3)), tl.load(table + (x >> 6))


@triton.jit
def points3(x, h, table, ASM: tl.constexpr):
    """Groups 0 to 3 of bytes of four low parts, and of nibbles (0 to 15) of their high bits."""
    if ASM:
        return tl.inline_asm_elementwise(
            ASM_3,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
            [x, h],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        p0 = tl.load(table + ((x & 3) | ((h & 1) << 2)))
        p1 = tl.load(table + (((x >> 2) & 3) | ((h & 2) << 1)))
        p2 = tl.load(table + (((x >> 4) & 3) | (h & 4)))
        p3 = tl.load(table + ((x >> 6) | ((h & 8) >> 1)))
        return p0, p1, p2, p3


@triton.jit
def dot_bf16(a, b, acc, NATIVE: tl.constexpr):
    """acc + a · b of bf16 operands with fp32 sums. Triton's interpreter multiplies the bits of bf16, hence
    the detour."""
    if NATIVE:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def load_nibbles(plane, row, column, WIDTH: tl.constexpr, mask):
    """Nibble `column` of `row` of a high plane of WIDTH nibbles a row: two of them, WIDTH / 2 apart, share
    a byte."""
    HALF: tl.constexpr = WIDTH // 2
    byte = tl.load(plane + row * HALF + column % HALF, mask=mask, other=0)
    return tl.where(column < HALF, byte & 15, byte >> 4)


@triton.jit
def load_scale16(pointer, mask):
    """float32 of `scale16` scales (`layout.py`); `pointer` to int16."""
    bits = tl.load(pointer, mask=mask, other=0)
    half = bits.to(tl.float16, bitcast=True).to(tl.float32)
    wide = ((bits & 0x7FFF).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.where(bits < 0, wide, half)
