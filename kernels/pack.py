"""Keys and values of finished pages -> packed pages (layout: `layout.py`).

    y = W (x - mean)            W = H diag(signs / balance) / sqrt(d); values have no mean and no balance
    code = nearest centroid of y unit / rms(y)
    scale = |y| / |centroids|   so the norm is preserved

Shapes: P page tokens, T = pages * P tokens, H KV heads, D head dimension, B bytes of a packed page.
Source: TurboQuant's MSE form (arXiv 2504.19874) with page means of the keys, a diagonal balance and
norm-preserving scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .codebook import pair_table, unit
from .layout import PageLayout, code_groups
from .scale16 import to_scale16

BF16_MAX = 3.3895313892515355e38
_CHUNK_VALUES = 1 << 17  # keeps the working set of one chunk in a CPU's second-level cache
_NO_NORM = 1e-30  # shorter vectors count as zero
_SAFE_MAX, _SAFE_MIN = (
    2.0**48,
    2.0**-48,
)  # outside of this, squares and sums of fp32 could overflow or lose bits


@dataclass(frozen=True)
class Rotations:
    """Constants of one layer, float32 and contiguous, on the device of the pages."""

    key_HDD: Tensor  # W_k of each head: y = W x
    key_inverse_HDD: Tensor
    value_DD: Tensor  # W_v, the same for all heads
    value_inverse_DD: Tensor


def chunks(tokens: int, page_tokens: int, values_per_token: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole pages whose values fit a cache together."""
    step = max(1, _CHUNK_VALUES // (page_tokens * values_per_token)) * page_tokens
    for start in range(0, tokens, step):
        yield start, min(start + step, tokens)


def pack_reference(k_THD: Tensor, v_THD: Tensor, rotations: Rotations, layout: PageLayout) -> Tensor:
    """uint8 [pages, H * head_bytes] of finite keys and values of T = pages * P tokens."""
    tokens, heads, dim = k_THD.shape
    pages = tokens // layout.page_tokens
    out_PHB = torch.zeros(pages, heads, layout.head_bytes, dtype=torch.uint8, device=k_THD.device)
    for start, end in chunks(tokens, layout.page_tokens, heads * dim):
        part = out_PHB[start // layout.page_tokens : end // layout.page_tokens]
        _pack_keys(k_THD[start:end], rotations.key_HDD, layout, part)
        _pack_values(v_THD[start:end], rotations.value_DD, layout, part)
    return out_PHB.view(pages, heads * layout.head_bytes)


def _pack_keys(k_THD: Tensor, rotation_HDD: Tensor, layout: PageLayout, out_PHB: Tensor) -> None:
    x_HPTD, exponent = _pages(k_THD, layout)
    y_HPTD = torch.bmm(x_HPTD.flatten(1, 2), rotation_HDD.transpose(1, 2)).view_as(x_HPTD)
    mean = y_HPTD.mean(2)
    if exponent is not None:
        mean = torch.ldexp(mean.double(), exponent).clamp(-BF16_MAX, BF16_MAX)
    stored = mean.to(torch.bfloat16)
    # What is subtracted is the mean as it is stored, so that its rounding costs nothing.
    mean = stored.double() if exponent is not None else stored.float()
    if exponent is not None:
        mean = torch.ldexp(mean, -exponent)
    y_HPTD.sub_(mean.float()[:, :, None])
    codes, scale = quantize(y_HPTD, layout.key_bits)
    _store(out_PHB, 0, pack_codes(codes, layout.key_bits))
    _store(out_PHB, layout.scale_key, _scale_bits(scale, exponent).view(torch.uint8))
    _store(out_PHB, layout.mean_key, stored.view(torch.uint8))


def _pack_values(v_THD: Tensor, rotation_DD: Tensor, layout: PageLayout, out_PHB: Tensor) -> None:
    x_HPTD, exponent = _pages(v_THD, layout)
    y_HPTD = (x_HPTD.view(-1, x_HPTD.shape[-1]) @ rotation_DD.T).view_as(x_HPTD)
    codes, scale = quantize(y_HPTD, layout.value_bits)
    _store(out_PHB, layout.codes_value, pack_codes(codes.transpose(2, 3), layout.value_bits))
    _store(out_PHB, layout.scale_value, _scale_bits(scale, exponent).view(torch.uint8))


def _pages(x_THD: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor | None]:
    """float32 [H, pages, P, D] and, where magnitudes are extreme, the powers of two taken out [H, pages,
    1]."""
    tokens, heads, dim = x_THD.shape
    x_HPTD = torch.empty(heads, tokens // layout.page_tokens, layout.page_tokens, dim, device=x_THD.device)
    x_HPTD.view(heads, tokens, dim).copy_(x_THD.transpose(0, 1))
    largest = torch.linalg.vector_norm(x_HPTD.flatten(2), ord=torch.inf, dim=2)
    if bool((((largest <= _SAFE_MAX) & (largest >= _SAFE_MIN)) | (largest == 0)).all()):
        return x_HPTD, None
    exponent = torch.frexp(largest).exponent.double()[..., None]  # double: ldexp forms the power in its dtype
    return torch.ldexp(x_HPTD.double(), -exponent[..., None]).float(), exponent


def _scale_bits(scale_HPT: Tensor, exponent: Tensor | None) -> Tensor:
    if exponent is not None:
        scale_HPT = torch.ldexp(scale_HPT.double(), exponent).clamp(max=BF16_MAX).float()
    return to_scale16(scale_HPT)


def quantize(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 codes [..., D] and float32 scales [...] of rotated vectors [..., D]; y is overwritten."""
    dim = y.shape[-1]
    norm = torch.linalg.vector_norm(y, dim=-1)
    to_grid = (unit(bits) * dim**0.5) / norm.clamp_min(_NO_NORM)
    y.mul_(to_grid[..., None]).floor_().clamp_(-128, 127)
    index = torch.add(y[..., : dim // 2], y[..., dim // 2 :], alpha=256).add_(128 * 257).to(torch.int32)
    pair = pair_table(bits).to(y.device).index_select(0, index.flatten()).view_as(index)
    square = (pair >> 8).to(torch.float32).sum(-1)
    both = pair.to(torch.uint8)
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    torch.bitwise_and(both, 15, out=codes[..., : dim // 2])
    torch.bitwise_right_shift(both, 4, out=codes[..., dim // 2 :])
    return codes, norm * square.rsqrt()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., rows, columns] -> uint8 [..., bytes], as `layout.py` draws it."""
    columns = codes.shape[-1]
    quarter = columns // code_groups(bits)
    parts = [codes[..., i * quarter : (i + 1) * quarter] for i in range(code_groups(bits))]
    if bits == 4:
        return (parts[0] | parts[1] << 4).flatten(-2)
    low, high = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for i, part in enumerate(parts):
        low |= (part & 3) << (2 * i)
        high |= (part >> 2) << i
    if bits == 2:
        return low.flatten(-2)
    eighth = quarter // 2
    return torch.cat([low.flatten(-2), (high[..., :eighth] | high[..., eighth:] << 4).flatten(-2)], -1)


def _store(out_PHB: Tensor, offset: int, section_HPB: Tensor) -> None:
    section = section_HPB.flatten(2)
    out_PHB[:, :, offset : offset + section.shape[-1]] = section.transpose(0, 1)
