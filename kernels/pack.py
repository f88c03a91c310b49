"""Keys and values of finished pages -> packed pages (layout: `layout.py`).

    y = W (x - mean)            W = H diag(signs / balance) / sqrt(d); values have no mean and no balance
    code = nearest centroid of y unit / rms(y)
    scale = |y| / |centroids|   so the norm is preserved

Shapes: P page tokens, T = pages * P tokens, H KV heads, D head dimension, B bytes of a packed page.
Source: TurboQuant's MSE form (arXiv 2504.19874) with page means of the keys, a diagonal balance and
norm-preserving scales.
"""

from collections.abc import Callable, Iterator
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


Rotate = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class NotFinite(ArithmeticError):
    """A page holds a number that is none."""


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
    """uint8 [pages, H * head_bytes] of keys and values of T = pages * P tokens. NotFinite where one is no number."""
    tokens, heads, dim = k_THD.shape
    pages = tokens // layout.page_tokens
    out_PHB = torch.zeros(pages, heads, layout.head_bytes, dtype=torch.uint8, device=k_THD.device)
    for start, end in chunks(tokens, layout.page_tokens, heads * dim):
        part = out_PHB[start // layout.page_tokens : end // layout.page_tokens]
        _pack_keys(k_THD[start:end], rotations.key_HDD, layout, part)
        _pack_values(v_THD[start:end], rotations.value_DD, layout, part)
    return out_PHB.view(pages, heads * layout.head_bytes)


def _pack_keys(k_THD: Tensor, rotation_HDD: Tensor, layout: PageLayout, out_PHB: Tensor) -> None:
    def rotate(x_HPTD: Tensor, exponent: Tensor | None) -> tuple[Tensor, Tensor]:
        y_HPTD = torch.bmm(x_HPTD.flatten(1, 2), rotation_HDD.transpose(1, 2)).view_as(x_HPTD)
        stored, mean = _stored_mean(y_HPTD.mean(2), exponent)
        # What is subtracted is the mean as it is stored, so that its rounding costs nothing.
        return y_HPTD.sub_(mean[:, :, None]), stored

    pairs, scale_bits, mean = _encode(_pages(k_THD, layout), rotate, layout.key_bits)
    _store(out_PHB, 0, _key_bytes(pairs, layout.key_bits))
    _store(out_PHB, layout.scale_key, scale_bits.view(torch.uint8))
    assert mean is not None
    _store(out_PHB, layout.mean_key, mean.view(torch.uint8))


def _pack_values(v_THD: Tensor, rotation_DD: Tensor, layout: PageLayout, out_PHB: Tensor) -> None:
    def rotate(x_HPTD: Tensor, exponent: Tensor | None) -> tuple[Tensor, None]:
        return (x_HPTD.view(-1, x_HPTD.shape[-1]) @ rotation_DD.T).view_as(x_HPTD), None

    pairs, scale_bits, _ = _encode(_pages(v_THD, layout), rotate, layout.value_bits)
    _store_values(out_PHB[:, :, layout.codes_value : layout.codes_value + layout.code_bytes_value], pairs, layout)
    _store(out_PHB, layout.scale_value, scale_bits.view(torch.uint8))


def _pages(x_THD: Tensor, layout: PageLayout) -> Tensor:
    """float32 [H, pages, P, D]."""
    tokens, heads, dim = x_THD.shape
    x_HPTD = torch.empty(heads, tokens // layout.page_tokens, layout.page_tokens, dim, device=x_THD.device)
    x_HPTD.view(heads, tokens, dim).copy_(x_THD.transpose(0, 1))
    return x_HPTD


def _stored_mean(mean_HPD: Tensor, exponent: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean in bf16 as it is stored, and as float32 with the powers of two taken out again."""
    if exponent is None:
        stored = mean_HPD.to(torch.bfloat16)
        return stored, stored.float()
    stored = torch.ldexp(mean_HPD.double(), exponent).clamp(-BF16_MAX, BF16_MAX).to(torch.bfloat16)
    return stored, torch.ldexp(stored.double(), -exponent).float()


def _encode(x_HPTD: Tensor, rotate: Rotate, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pairs of codes [H, pages, P, D / 2], scale16 bits [H, pages, P] and the stored mean.

    The norms tell whether any number is extreme, or none at all; looking at every input would take as long as packing.
    """
    y_HPTD, mean = rotate(x_HPTD, None)
    norm = torch.linalg.vector_norm(y_HPTD, dim=-1)
    least, most = norm.aminmax()
    exponent = None
    if not (float(least) >= _SAFE_MIN and float(most) <= _SAFE_MAX):
        exponent = _exponents(x_HPTD)
        if exponent is not None:
            scaled = torch.ldexp(x_HPTD.double(), -exponent[..., None]).float()
            y_HPTD, mean = rotate(scaled, exponent)
            norm = torch.linalg.vector_norm(y_HPTD, dim=-1)
    pairs, scale = _quantize(y_HPTD, norm, bits)
    if exponent is not None:
        scale = torch.ldexp(scale.double(), exponent).clamp(max=BF16_MAX).float()
    return pairs, to_scale16(scale), mean


def _exponents(x_HPTD: Tensor) -> Tensor | None:
    """The powers of two to take out, [H, pages, 1], or None where none are needed."""
    largest = x_HPTD.abs().amax((2, 3))
    if not bool(largest.isfinite().all()):
        raise NotFinite("a page holds NaN or infinity")
    if bool((((largest <= _SAFE_MAX) & (largest >= _SAFE_MIN)) | (largest == 0)).all()):
        return None
    return torch.frexp(largest).exponent.double()[..., None]  # double: ldexp forms the power in its dtype


def _quantize(y: Tensor, norm: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of rotated vectors [..., D], uint8 [..., D / 2] with j in the low and j + D/2 in the high half of a
    byte, and float32 scales [...]. y is overwritten."""
    dim = y.shape[-1]
    to_grid = (unit(bits) * dim**0.5) / norm.clamp_min(_NO_NORM)
    y.mul_(to_grid[..., None]).floor_().clamp_(-128, 127)
    index = torch.add(y[..., : dim // 2], y[..., dim // 2 :], alpha=256).add_(128 * 257).to(torch.int32)
    pairs = pair_table(bits).to(y.device).index_select(0, index.flatten()).view_as(index)
    square = (pairs >> 8).to(torch.float32).sum(-1)
    return pairs.to(torch.uint8), norm * square.rsqrt()


def _key_bytes(pairs: Tensor, bits: int) -> Tensor:
    """Sections codesK [H, pages, bytes] from pairs [H, pages, P, D / 2]; the bytes of 4 bits are the pairs."""
    if bits == 4:
        return pairs.flatten(2)
    quarter = pairs.shape[-1] // 2
    parts = [half[..., i : i + quarter] for half in (pairs & 15, pairs >> 4) for i in (0, quarter)]
    low, high = _planes(parts, bits)
    if high is None:
        return low.flatten(2)
    eighth = quarter // 2
    return torch.cat([low.flatten(2), (high[..., :eighth] | high[..., eighth:] << 4).flatten(2)], 2)


def _store_values(section_PHB: Tensor, pairs: Tensor, layout: PageLayout) -> None:
    """Fills the sections codesV: rows are dimensions."""
    dim, bits = layout.head_dim, layout.value_bits
    width = layout.page_tokens // code_groups(bits)
    low_bytes = dim * width
    out_low = section_PHB[:, :, :low_bytes].unflatten(2, (dim, width)).permute(1, 0, 3, 2)
    for half, columns in ((pairs & 15, slice(0, dim // 2)), (pairs >> 4, slice(dim // 2, dim))):
        low, high = _planes(list(half.split(width, dim=2)), bits)
        out_low[..., columns] = low
        if high is not None:
            out_high = section_PHB[:, :, low_bytes:].unflatten(2, (dim, width // 2)).permute(1, 0, 3, 2)
            out_high[..., columns] = high[:, :, : width // 2] | high[:, :, width // 2 :] << 4


def _planes(parts: list[Tensor], bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes that share a byte -> that byte and, at 3 bits, the nibble of their high bits."""
    if bits == 4:
        return parts[0] | parts[1] << 4, None
    low, high = parts[0] & 3, parts[0] >> 2
    for i, part in enumerate(parts[1:], 1):
        low = low | (part & 3) << (2 * i)
        high = high | (part >> 2) << i
    return low, high if bits == 3 else None


def _store(out_PHB: Tensor, offset: int, section_HPB: Tensor) -> None:
    section = section_HPB.flatten(2)
    out_PHB[:, :, offset : offset + section.shape[-1]] = section.transpose(0, 1)
