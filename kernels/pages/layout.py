"""Where the bytes of a packed page lie.

    page  = head 0 | head 1 | ...                         one layer, all KV heads
    head  = codesK | codesV | scaleK | scaleV | meanK     each padded to 16 bytes

    codesK  rows = tokens,     columns = dimensions       [P, d]
    codesV  rows = dimensions, columns = tokens           [d, P]
    scaleK, scaleV  one `scale16` a token                 [P]
    meanK   bf16, the rotated mean of the page's keys     [d]

A row of n codes, packed so that one byte holds columns that lie n/2 or n/4 apart and no kernel has to
interleave:

    4 bits  n/2 bytes  byte j = code j | code j + n/2 << 4
    2 bits  n/4 bytes  byte j = code j | code j + n/4 << 2 | code j + n/2 << 4 | code j + 3n/4 << 6
    3 bits  all rows of the low plane, n/4 bytes each (the low two bits, as at 2 bits), then all rows of the
    high plane,
            n/8 bytes each: byte j = nibble j | nibble j + n/8 << 4, where bit i of nibble j is the high bit
            of code j + i n/4

Values are stored across tokens because a product with the attention weights sums over tokens: the summed
index is contiguous in memory for keys (dimensions) and for values (tokens) alike.

scale16 is a non-negative float in 16 bits that no finite float32 overflows. Sign bit clear: the bits of a half float
(11 bits of precision, 2^-14 to 65504). Sign bit set: the other 15 bits are those of a bfloat16 without its sign (8 bits
of precision), for what lies outside of that range.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
_HALF_MIN, _HALF_MAX = 2.0**-14, 65504.0
_BF16_MAX = 3.3895313892515355e38


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """Offsets, in bytes, of the sections of one KV head in a packed page."""

    head_dim: int
    page_tokens: int
    key_bits: int
    value_bits: int

    @property
    def code_bytes_key(self) -> int:
        return self.page_tokens * self.head_dim * self.key_bits // 8

    @property
    def code_bytes_value(self) -> int:
        return self.page_tokens * self.head_dim * self.value_bits // 8

    @property
    def codes_value(self) -> int:
        return _aligned(self.code_bytes_key)

    @property
    def scale_key(self) -> int:
        return self.codes_value + _aligned(self.code_bytes_value)

    @property
    def scale_value(self) -> int:
        return self.scale_key + _aligned(2 * self.page_tokens)

    @property
    def mean_key(self) -> int:
        return self.scale_value + _aligned(2 * self.page_tokens)

    @property
    def head_bytes(self) -> int:
        return self.mean_key + _aligned(2 * self.head_dim)

    @property
    def has_padding(self) -> bool:
        """Whether there are bytes between the sections."""
        codes = self.code_bytes_key + self.code_bytes_value
        return self.head_bytes > codes + 4 * self.page_tokens + 2 * self.head_dim


def to_scale16(scale: Tensor) -> Tensor:
    """int16 bits of float32 scales >= 0, same shape. Values over the largest bfloat16 become that."""
    half = scale.to(torch.float16).view(torch.int16)
    wide = scale.clamp(max=_BF16_MAX).to(torch.bfloat16).view(torch.int16)
    is_half = (scale >= _HALF_MIN) & (scale <= _HALF_MAX) | (scale == 0)
    return torch.where(is_half, half, wide | -0x8000)


def from_scale16(bits: Tensor) -> Tensor:
    """float32 of int16 bits, same shape."""
    half = bits.view(torch.float16).float()
    wide = (bits & 0x7FFF).view(torch.bfloat16).float()
    return torch.where(bits < 0, wide, half)
