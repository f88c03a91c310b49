"""Keys and values of finished pages -> packed pages (layout: `layout.py`).

    y = W (x - mean)            W = H diag(signs / balance) / sqrt(d); values have no mean and no balance
    code = nearest centroid of y unit / rms(y)
    scale = |y| / |centroids|   so the norm is preserved

Shapes: P page tokens, T = pages * P tokens, H KV heads, D head dimension, B bytes of a packed page. On a CPU the time
goes into the rotation (a third), the table of codes (a sixth) and a dozen passes over memory: all in blocks that stay
in cache, in memory that is used again, keys and values together.

Source: TurboQuant's MSE form (arXiv 2504.19874) with page means of the keys, a diagonal balance and
norm-preserving scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .codebook import pair_table, unit
from .layout import PageLayout
from .pack_codes import store_keys, store_values
from .rotation import hadamard
from .scale16 import to_scale16
from .scratch import scratch

BF16_MAX = 3.3895313892515355e38
_CHUNK_VALUES = 1 << 17  # of keys, and as many of values: keeps the working set of a chunk near a CPU's cache
_NO_NORM = 1e-30  # shorter vectors count as zero
_SAFE_MAX, _SAFE_MIN = 2.0**48, 2.0**-48  # outside of this, squares and sums of fp32 could overflow or lose bits


class NotFinite(ArithmeticError):
    """A page holds a number that is none."""


@dataclass(frozen=True)
class Rotations:
    """Constants of one layer, float32 and contiguous, on the device of the pages."""

    key_HDD: Tensor  # W_k of each head: y = W x
    key_inverse_HDD: Tensor  # diag(key_gain) Hᵀ
    value_DD: Tensor  # W_v, the same for all heads
    value_inverse_DD: Tensor
    key_gain_HD: Tensor  # signs · balance / sqrt(d)
    value_gain_D: Tensor  # signs / sqrt(d)

    @cached_property
    def paired_HDD(self) -> Tensor:
        """[H + 1, D in, D out] of all heads' keys and of values, for row vectors; outputs c and c + D/2 are neighbours,
        so that the two bytes that become one byte of codes are one 16-bit word."""
        dim = self.value_DD.shape[0]
        order = torch.arange(dim, device=self.value_DD.device).view(2, dim // 2).T.flatten()
        both = torch.cat([self.key_HDD, self.value_DD[None]])
        return both[:, order].transpose(1, 2).contiguous()

    @cached_property
    def value_signed_DD(self) -> Tensor:
        """int8 H diag(signs) of the values."""
        matrix = hadamard(self.value_DD.shape[0]).to(self.value_gain_D.device)
        return (matrix * self.value_gain_D.sign()).to(torch.int8)


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
        _pack_chunk(k_THD[start:end], v_THD[start:end], rotations, layout, part)
    return out_PHB.view(pages, heads * layout.head_bytes)


def _pack_chunk(k_THD: Tensor, v_THD: Tensor, rotations: Rotations, layout: PageLayout, out_PHB: Tensor) -> None:
    """The norms tell whether any number is extreme, or none at all: looking at every input would take longer."""
    tokens, heads, dim = k_THD.shape
    pages, page = tokens // layout.page_tokens, layout.page_tokens
    inputs = [_float32(x, f"x{i}") for i, x in enumerate((k_THD, v_THD))]
    y_2THD = scratch("y", (2, tokens, heads, dim), torch.float32, k_THD.device)
    mean, norm = _rotate(inputs, None, rotations, y_2THD, page)
    exponent = None
    least, most = norm.aminmax()
    if not (float(least) >= _SAFE_MIN and float(most) <= _SAFE_MAX):
        exponent = _exponents(inputs, page)
        if exponent is not None:
            per_token = exponent.repeat_interleave(page, 1)[..., None]
            scaled = [torch.ldexp(x.double(), -e).float() for x, e in zip(inputs, per_token, strict=True)]
            mean, norm = _rotate(scaled, exponent[0], rotations, y_2THD, page)
    pairs, scale = _quantize(y_2THD, norm, layout)
    if exponent is not None:
        scale = torch.ldexp(scale.double(), exponent.repeat_interleave(page, 1)).clamp(max=BF16_MAX).float()
    bits = to_scale16(scale).view(2, pages, page, heads).transpose(2, 3).contiguous().view(torch.uint8)
    store_keys(out_PHB[:, :, : layout.code_bytes_key], pairs[0].view(pages, page, heads, -1), layout.key_bits)
    section = out_PHB[:, :, layout.codes_value : layout.codes_value + layout.code_bytes_value]
    store_values(section, pairs[1].view(pages, page, heads, -1), layout.value_bits)
    out_PHB[:, :, layout.scale_key : layout.scale_key + 2 * page] = bits[0]
    out_PHB[:, :, layout.scale_value : layout.scale_value + 2 * page] = bits[1]
    natural = mean.view(pages, heads, dim // 2, 2).transpose(2, 3).contiguous().view(pages, heads, dim)
    out_PHB[:, :, layout.mean_key : layout.mean_key + 2 * dim] = natural.view(torch.uint8)


def _float32(x_THD: Tensor, name: str) -> Tensor:
    if x_THD.dtype == torch.float32:
        return x_THD
    return scratch(name, tuple(x_THD.shape), torch.float32, x_THD.device).copy_(x_THD)


def _rotate(
    inputs: list[Tensor], exponent_PH: Tensor | None, rotations: Rotations, y_2THD: Tensor, page: int
) -> tuple[Tensor, Tensor]:
    """Fills y with the rotated keys, less their page's mean, and values, in pairs. Returns the means as they are
    stored, [pages, H, D] in pairs, and the norms [2, T, H]."""
    _, tokens, heads, dim = y_2THD.shape
    matrices = rotations.paired_HDD
    for head in range(heads):
        torch.mm(inputs[0][:, head], matrices[head], out=y_2THD[0, :, head])
    torch.mm(inputs[1].reshape(-1, dim), matrices[heads], out=y_2THD[1].view(-1, dim))
    keys_PTHD = y_2THD[0].view(tokens // page, page, heads, dim)
    stored, mean = _stored_mean(keys_PTHD.mean(1), exponent_PH)
    # What is subtracted is the mean as it is stored, so that its rounding costs nothing.
    keys_PTHD.sub_(mean[:, None])
    square = torch.mul(y_2THD, y_2THD, out=scratch("square", (2, tokens, heads, dim), y_2THD.dtype, y_2THD.device))
    norm = torch.mv(square.view(-1, dim), torch.ones(dim, device=square.device)).sqrt_()
    return stored, norm.view(2, tokens, heads)


def _stored_mean(mean_PHD: Tensor, exponent_PH: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean in bf16 as it is stored, and as float32 with the powers of two taken out again."""
    if exponent_PH is None:
        stored = mean_PHD.to(torch.bfloat16)
        return stored, stored.float()
    power = exponent_PH[..., None]
    stored = torch.ldexp(mean_PHD.double(), power).clamp(-BF16_MAX, BF16_MAX).to(torch.bfloat16)
    return stored, torch.ldexp(stored.double(), -power).float()


def _exponents(inputs: list[Tensor], page: int) -> Tensor | None:
    """The powers of two to take out of keys and values, [2, pages, H], or None where none are needed."""
    largest = torch.stack([x.unflatten(0, (-1, page)).abs().amax((1, 3)) for x in inputs])
    if not bool(largest.isfinite().all()):
        raise NotFinite("a page holds NaN or infinity")
    if bool((((largest <= _SAFE_MAX) & (largest >= _SAFE_MIN)) | (largest == 0)).all()):
        return None
    return torch.frexp(largest).exponent.double()  # double: ldexp forms the power in its dtype


def _quantize(y_2THD: Tensor, norm_2TH: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Codes of rotated keys and values, uint8 [2, T, H, D / 2] with c in the low and c + D/2 in the high half of a
    byte, and float32 scales [2, T, H]. y is overwritten."""
    dim, device, kinds = y_2THD.shape[3], y_2THD.device, (layout.key_bits, layout.value_bits)
    half = (*y_2THD.shape[:3], dim // 2)
    units = torch.tensor([unit(bits) * dim**0.5 for bits in kinds], device=device).view(2, 1, 1)
    y_2THD.mul_((units / norm_2TH.clamp_min(_NO_NORM))[..., None]).floor_().clamp_(-128, 127)
    grid = scratch("grid", tuple(y_2THD.shape), torch.int8, device).copy_(y_2THD)
    index = words(grid.view(torch.uint8), scratch("index", half, torch.int32, device))
    found = scratch("found", half, torch.int32, device)
    if kinds[0] == kinds[1]:
        torch.index_select(pair_table(kinds[0]).to(device), 0, index.view(-1), out=found.view(-1))
    else:
        for kind, bits in enumerate(kinds):
            torch.index_select(pair_table(bits).to(device), 0, index[kind].view(-1), out=found[kind].view(-1))
    pairs = scratch("pairs", half, torch.uint8, device).copy_(found)
    found.bitwise_right_shift_(8)
    square = scratch("y", half, torch.float32, device).copy_(found)
    norm = torch.mv(square.view(-1, dim // 2), torch.ones(dim // 2, device=device))
    return pairs, norm_2TH * norm.rsqrt_().view(norm_2TH.shape)


def words(bytes_: Tensor, out: Tensor) -> Tensor:
    """int32 of the unsigned 16-bit words (the first byte is the low one) of uint8 [..., 2 n]."""
    if out.device.type == "cpu":
        return out.copy_(bytes_.view(torch.uint16))
    return out.copy_(bytes_.view(torch.int16)).bitwise_and_(0xFFFF)
