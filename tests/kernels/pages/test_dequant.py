"""The PTX of `dequant_triton.py`, run by a few lines of Python over every byte: no GPU needed."""

import re

import pytest

from isthmus.kernels.pages.codebook import centroids
from isthmus.kernels.pages.dequant_triton import ASM_2, ASM_3, ASM_4

ASM = {2: ASM_2.value, 3: ASM_3.value, 4: ASM_4.value}
WORD = 0xFFFFFFFF


def permute(low: int, high: int, selector: int) -> int:
    """PTX prmt.b32."""
    pool = [(high << 32 | low) >> 8 * i & 255 for i in range(8)]
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return out


RUN = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b & WORD,
    "shr": lambda a, b: a >> b,
    "prmt": permute,
}


def run(ptx: str, **registers: int) -> dict[str, int]:
    values = dict(registers)
    for name, operands in re.findall(r"(\w+)\.b32 ([^;]+);", ptx.partition(";")[2]):
        to, *rest = [part.strip() for part in operands.split(",")]
        values[to] = RUN[name](*(int(x, 0) if x[0].isdigit() else values[x] for x in rest))
    return values


def points(words: list[int]) -> list[int]:
    """2 (128 + v) - 383 of the bf16 halves: centroids."""
    halves = [word >> 16 * i & 0xFFFF for word in words for i in range(2)]
    assert all(half >> 7 == 0x4300 >> 7 for half in halves)
    return [2 * (128 + (half & 127)) - 383 for half in halves]


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_every_byte(bits: int):
    groups, inputs = (2, 4) if bits == 4 else (4, 8)
    table = centroids(bits)
    for start in range(0, 256, 4):
        data = [start, start + 1, 255 - start, start ^ 0x5A]
        high = [(7 * byte + 3) & 15 for byte in data]
        registers = {f"${inputs}": sum(byte << 8 * i for i, byte in enumerate(data))}
        registers[f"${inputs + 1}"] = sum(nibble << 8 * i for i, nibble in enumerate(high))
        out = run(ASM[bits], **registers)
        for group in range(groups):
            got = points([out[f"${2 * group + i}"] for i in range(2)])
            low = 4 if bits == 4 else 2
            codes = [byte >> low * group & (1 << low) - 1 for byte in data]
            if bits == 3:
                codes = [code | (nibble >> group & 1) << 2 for code, nibble in zip(codes, high, strict=True)]
            assert got == [table[code] for code in codes]
