"""Keys and values of finished pages -> packed pages (layout: `layout.py`).

    y = W (x - mean)            W = H diag(signs / balance) / sqrt(d); values have no mean and no balance
    code = nearest centroid of y unit / rms(y)
    scale = |y| / |centroids|   so the norm is preserved

Shapes: P page tokens, T = pages * P tokens, H KV heads, D head dimension, B bytes of a packed page. Keys and values go
through each step together, a few pages at a time so that they stay in a cache. On a CPU `pack_cpu.py` is faster.

Source: TurboQuant's MSE form (arXiv 2504.19874) with page means of the keys, a diagonal balance and
norm-preserving scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..cpu.int8_product import int8_product
from ..rotation import hadamard
from ..scale16 import to_scale16
from ..scratch import scratch, space
from .codebook import pair_table, pair_weights, unit
from .layout import PageLayout
from .pack_codes import store_keys, store_values

BF16_MAX = 3.3895313892515355e38
_CHUNK_VALUES = 1 << 17  # of keys, and as many of values
_NO_NORM = 1e-30  # shorter vectors count as zero
SAFE_MAX, SAFE_MIN = 2.0**48, 2.0**-48  # outside of this, squares and sums of fp32 could overflow or lose bits


class NotFinite(ArithmeticError):
    """A page holds a number that is none."""


@dataclass(frozen=True)
class Rotations:
    """Constants of one layer, float32 and contiguous, on the device of the pages."""

    key_inverse_HDD: Tensor  # the inverse of W_k of each head: diag(key_gain) Hᵀ
    value_inverse_DD: Tensor  # of W_v, which is the same for all heads
    key_gain_HD: Tensor  # signs · balance / sqrt(d)
    value_gain_D: Tensor  # signs / sqrt(d)
    key_weight_HD: Tensor  # signs / balance
    value_weight_D: Tensor  # signs

    @cached_property
    def paired_HDD(self) -> Tensor:
        """sqrt(d) W, [H + 1, D in, D out] of the keys of all heads and the values, to multiply rows with. Outputs c and
        c + D/2 are neighbours: the two bytes that become one byte of codes make one 16-bit word."""
        weights = torch.cat([self.key_weight_HD, self.value_weight_D[None]])
        both = hadamard(weights.shape[1]).to(weights.device) * weights[:, None]
        paired = both.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return paired.transpose(1, 2).contiguous()

    @cached_property
    def value_signed_DD(self) -> Tensor:
        """int8 H diag(signs) of the values."""
        matrix = hadamard(self.value_weight_D.shape[0]).to(self.value_weight_D.device)
        return (matrix * self.value_weight_D).to(torch.int8)


class _Space:
    """Scratch tensors for packing some pages. The rows of y are the keys' [H, T] and the values' [T, H]."""

    def __init__(self, pages: int, heads: int, layout: PageLayout, device: torch.device) -> None:
        page, dim = layout.page_tokens, layout.head_dim
        tokens, half = pages * page, layout.head_dim // 2
        rows = tokens * heads

        def make(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return scratch(name, shape, dtype, device)

        self.floats = [make(name, tokens, heads, dim) for name in ("keys", "values")]
        self.y = make("y", 2 * rows, dim)
        self.y_keys, self.y_values = self.y[:rows].view(heads, tokens, dim), self.y[rows:]
        self.y_pages = self.y[:rows].view(heads, pages, page, dim)
        self.norm = make("norm", 2 * rows)
        self.gain = make("gain", 2 * rows)
        self.gain_rows, self.gain_kinds = self.gain[:, None], self.gain.view(2, rows)
        self.root = dim**0.5
        self.units = torch.tensor([[unit(layout.key_bits)], [unit(layout.value_bits)]], device=device)
        self.grid = make("grid", 2 * rows, dim, dtype=torch.int8)
        self.words = self.grid.view(torch.uint16).view(-1)
        self.index = make("index", 2 * rows * half, dtype=torch.int32)
        self.found = make("found", 2 * rows * half, dtype=torch.int32)
        self.lookups = [(pair_table(layout.key_bits).to(device), self.index, self.found)]
        if layout.key_bits != layout.value_bits:
            bits = (layout.key_bits, layout.value_bits)
            parts = zip(bits, self.index.view(2, -1), self.found.view(2, -1), strict=True)
            self.lookups = [(pair_table(b).to(device), index, found) for b, index, found in parts]
        self.found_rows, self.found_bytes = self.found.view(-1, half), self.found.view(torch.int8).view(-1, 2 * dim)
        self.weights, self.sums = pair_weights(half).to(device), make("sums", 2 * rows, 1, dtype=torch.int32)
        self.pairs = make("pairs", 2 * rows, half, dtype=torch.uint8)
        self.pairs_keys = self.pairs[:rows].view(heads, pages, page, half).transpose(0, 1)
        self.pairs_values = self.pairs[rows:].view(pages, page, heads, half)


def chunks(tokens: int, page_tokens: int, values_per_token: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole pages whose values fit a cache together."""
    step = max(1, _CHUNK_VALUES // (page_tokens * values_per_token)) * page_tokens
    for start in range(0, tokens, step):
        yield start, min(start + step, tokens)


def pack_reference(k_THD: Tensor, v_THD: Tensor, rotations: Rotations, layout: PageLayout) -> Tensor:
    """uint8 [pages, H * head_bytes] of keys and values of T = pages * P tokens. NotFinite where one is no number."""
    tokens, heads, dim = k_THD.shape
    page = layout.page_tokens
    make = torch.zeros if layout.has_padding else torch.empty
    out_PHB = make(tokens // page, heads, layout.head_bytes, dtype=torch.uint8, device=k_THD.device)
    for start, end in chunks(tokens, page, heads * dim):
        one = space(_Space, (end - start) // page, heads, layout, k_THD.device)
        _pack_chunk(k_THD[start:end], v_THD[start:end], rotations, layout, one, out_PHB[start // page : end // page])
    return out_PHB.view(-1, heads * layout.head_bytes)


def _pack_chunk(
    k_THD: Tensor, v_THD: Tensor, rotations: Rotations, layout: PageLayout, one: _Space, out_PHB: Tensor
) -> None:
    """The norms tell whether any number is extreme, or none at all: looking at every input would take longer."""
    inputs = [_float32(x, buffer) for x, buffer in zip((k_THD, v_THD), one.floats, strict=True)]
    mean_HPD = _rotate(inputs, None, rotations, one)
    exponent = None
    least, most = one.norm.aminmax()
    if not (least.item() >= SAFE_MIN and most.item() <= SAFE_MAX):
        exponent = _exponents(inputs, layout.page_tokens)
        if exponent is not None:
            each = exponent.repeat_interleave(layout.page_tokens, 1)[..., None]
            scaled = [torch.ldexp(x.double(), -e).float() for x, e in zip(inputs, each, strict=True)]
            mean_HPD = _rotate(scaled, exponent[0], rotations, one)
    scale = _quantize(one)
    if exponent is not None:
        each = exponent.repeat_interleave(layout.page_tokens, 1)
        power = torch.cat([each[0].T.flatten(), each[1].flatten()])
        scale = torch.ldexp(scale.double(), power).clamp(max=BF16_MAX).float()
    _store(out_PHB, layout, one, to_scale16(scale), mean_HPD)


def _float32(x_THD: Tensor, buffer: Tensor) -> Tensor:
    return x_THD if x_THD.dtype == torch.float32 else buffer.copy_(x_THD)


def _rotate(inputs: list[Tensor], exponent_PH: Tensor | None, rotations: Rotations, one: _Space) -> Tensor:
    """Fills y with the rotated keys, less their page's mean, and values, in pairs, all times sqrt(d), because sums of
    whole numbers then are exact; and norm with its rows' norms, without that factor. Returns the means as they are
    stored, bf16 [H, pages, D], in pairs."""
    torch.bmm(inputs[0].transpose(0, 1), rotations.paired_HDD[:-1], out=one.y_keys)
    torch.mm(inputs[1].reshape(one.y_values.shape), rotations.paired_HDD[-1], out=one.y_values)
    stored, mean = _stored_mean(one.y_pages.mean(2).div_(one.root), exponent_PH)
    # What is subtracted is the mean as it is stored, so that its rounding costs nothing.
    one.y_pages.sub_(mean.mul_(one.root)[:, :, None])
    torch.linalg.vector_norm(one.y, dim=-1, out=one.norm).div_(one.root)
    return stored


def _stored_mean(mean_HPD: Tensor, exponent_PH: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean in bf16 as it is stored, and as a new float32 tensor with the powers of two taken out again."""
    if exponent_PH is None:
        stored = mean_HPD.to(torch.bfloat16)
        return stored, stored.float()
    power = exponent_PH.T[..., None]
    stored = torch.ldexp(mean_HPD.double(), power).clamp(-BF16_MAX, BF16_MAX).to(torch.bfloat16)
    return stored, torch.ldexp(stored.double(), -power).float()


def _exponents(inputs: list[Tensor], page: int) -> Tensor | None:
    """The powers of two to take out of keys and values, [2, pages, H], or None where none are needed."""
    largest = torch.stack([x.unflatten(0, (-1, page)).abs().amax((1, 3)) for x in inputs])
    if not bool(largest.isfinite().all()):
        raise NotFinite("a page holds NaN or infinity")
    if bool((((largest <= SAFE_MAX) & (largest >= SAFE_MIN)) | (largest == 0)).all()):
        return None
    return torch.frexp(largest).exponent.double()  # double: ldexp forms the power in its dtype


def _quantize(one: _Space) -> Tensor:
    """Codes of y, with c in the low and c + D/2 in the high half of a byte, into `pairs`; returns the scales of its
    rows, float32. y is overwritten."""
    torch.div(one.units, one.norm.clamp_min(_NO_NORM).view_as(one.gain_kinds), out=one.gain_kinds)
    one.y.mul_(one.gain_rows).floor_().clamp_(-128, 127)
    one.grid.copy_(one.y)
    read_words(one.words, one.index)
    for table, index, found in one.lookups:
        torch.index_select(table, 0, index, out=found)
    one.pairs.copy_(one.found_rows)
    int8_product(one.found_bytes, one.weights, one.sums)
    square = one.sums.flatten().mul_(8).add_(one.y.shape[1])
    return square.rsqrt().mul_(one.norm)


def read_words(words: Tensor, out: Tensor) -> None:
    """Fills int32 `out` with uint16 words."""
    if out.device.type == "cpu":
        out.copy_(words)
    else:
        out.copy_(words.view(torch.int16)).bitwise_and_(0xFFFF)


def _store(out_PHB: Tensor, layout: PageLayout, one: _Space, scale_bits: Tensor, mean_HPD: Tensor) -> None:
    pages, heads = out_PHB.shape[:2]
    page, value = layout.page_tokens, layout.codes_value
    store_keys(out_PHB[:, :, : layout.code_bytes_key], one.pairs_keys, layout.key_bits)
    store_values(out_PHB[:, :, value : value + layout.code_bytes_value], one.pairs_values, layout.value_bits)
    out16 = out_PHB.view(torch.int16)
    scales, start = scale_bits.view(2, -1), layout.scale_key // 2
    out16[:, :, start : start + page] = scales[0].view(heads, pages, page).transpose(0, 1)
    start = layout.scale_value // 2
    out16[:, :, start : start + page] = scales[1].view(pages, page, heads).transpose(1, 2)
    start = layout.mean_key // 2
    mean16 = mean_HPD.view(torch.int16).unflatten(2, (-1, 2)).permute(1, 0, 3, 2)  # no longer in pairs
    out16[:, :, start : start + layout.head_dim].unflatten(2, (2, -1)).copy_(mean16)
