"""Unpacking on a CPU, compiled: `reference.py`'s arithmetic in fp32, a head of a page at a time, which a core's cache
holds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu.compiled import compiled
from ..cpu.numbers import from_scale16_bits, np_view, number, stored
from ..cpu.threads import in_parts
from ..fast_paths import FastPath, alike, spread
from .codebook import magnitude_steps
from .layout import PageLayout
from .pack_cpu import pack_cpu
from .reference import pack_reference, unpack_reference
from .rotation import Rotations, build_rotations, paley_factor
from .tiles import U, rotate, to_centroids, transpose

_LARGE = np.float32(1e30)  # scales and means over this may overflow fp32 on the way


def unpack_cpu(
    packed_NB: Tensor, rotations: Rotations, layout: PageLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`unpack_reference` for tensors on a CPU; it does the pages that fp32 cannot hold on the way."""
    if dtype == torch.float16:
        k_THD, v_THD = unpack_cpu(packed_NB, rotations, layout, torch.float32)
        limit = torch.finfo(dtype).max
        return k_THD.clamp_(-limit, limit).to(dtype), v_THD.clamp_(-limit, limit).to(dtype)
    page, dim, heads = layout.page_tokens, layout.head_dim, rotations.key_gain_HD.shape[0]
    pages = packed_NB.shape[0]
    dense = [torch.empty(pages * page, heads, dim, dtype=dtype) for _ in range(2)]
    packed, unsafe = packed_NB.contiguous().view(-1).numpy(), np.zeros(pages, dtype=np.uint8)
    paley = paley_factor(dim).T.contiguous().numpy()
    kinds: list[Callable[[Any, int, int], None]] = []
    for keys, x, bits in ((True, dense[0], layout.key_bits), (False, dense[1], layout.value_bits)):
        gain = rotations.key_gain_HD if keys else rotations.value_gain_D.expand(heads, dim).contiguous()
        steps = np.array(magnitude_steps(bits), dtype=np.int8)
        codes, scale = (0, layout.scale_key) if keys else (layout.codes_value, layout.scale_value)
        places = (layout.head_bytes, codes, scale, layout.mean_key)
        out = np_view(x.view(-1))
        kinds.append(partial(_unpack, packed, gain.numpy(), keys, bits, steps, places, paley, page, out))

    def run(first: int, end: int) -> None:
        for kind in kinds:
            kind(unsafe, first, end)

    in_parts(run, pages, 2 * dense[0].numel())
    if unsafe.any():
        again = torch.from_numpy(unsafe.astype(bool))
        tokens = again.repeat_interleave(page)
        for x_THD, safe_THD in zip(dense, unpack_reference(packed_NB[again], rotations, layout, dtype), strict=True):
            x_THD[tokens] = safe_THD
    return dense[0], dense[1]


def packs_compiled(dtype: torch.dtype) -> bool:
    """Whether `pack_cpu` and `unpack_cpu` are used for pages of that dtype. The first call compiles them, or reads them
    from disk, so that no request waits for that."""
    return _COMPILED[torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]()


def _works(dtype: torch.dtype) -> bool:
    layout = PageLayout(head_dim=8, page_tokens=8, key_bits=4, value_bits=4)
    rotations = build_rotations(torch.ones(1, 8), torch.device("cpu"))
    x_THD = spread(16, 1, 8, dtype=dtype)
    fast, plain = (pack(x_THD, x_THD, rotations, layout) for pack in (pack_cpu, pack_reference))
    dense = unpack_cpu(plain, rotations, layout, dtype), unpack_reference(plain, rotations, layout, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    same = all(alike(*pair, tolerance) for pair in zip(*dense, strict=True))
    return same and int((fast != plain).sum()) <= 2  # the last bit of a sum may move a code


_COMPILED = {
    dtype: FastPath(f"compiled packing of {name} pages", partial(_works, dtype))
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}


@compiled(error_model="numpy")
def _unpack(
    packed: Any,
    gain: Any,
    keys: bool,
    bits: int,
    steps: Any,
    places: tuple[int, int, int, int],
    paley: Any,
    page: int,
    out: Any,
    unsafe: Any,
    first: int,
    end: int,
) -> None:
    """The keys or the values of pages [first, end) into `out`, flat; `places` in `packed` as in `pack_cpu._pack`.
    `unsafe`: pages whose scales or means are too large."""
    heads, dim = gain.shape
    tile, spare = np.empty(dim * page, dtype=np.float32), np.empty(dim * max(page, heads), dtype=np.float32)
    done, grid = np.empty(dim * page, dtype=out.dtype), np.empty(dim * page, dtype=np.int8)
    codes, joined = np.empty(dim * page, dtype=np.uint8), np.empty(dim * page // 2, dtype=np.uint8)
    scale, means = np.empty(page, dtype=np.float32), np.zeros(dim * heads, dtype=np.float32)
    for n in range(first, end):
        if keys:
            unsafe[n] |= not _read_means(packed, U(n * heads * places[0] + places[3]), U(places[0]), U(heads), means)
            rotate(means, heads, paley, spare)
        for head in range(heads):
            one = U((n * heads + head) * places[0])
            unsafe[n] |= not _read_scales(packed, one + U(places[2]), scale)
            _split(packed, one + U(places[1]), U(page), keys, bits, joined, codes)
            to_centroids(codes, steps, 1 << (bits - 1), grid)
            for i in range(U(0), U(dim * page)):
                tile[i] = grid[i]
            rotate(tile, page, paley, spare)
            _finish(tile, scale, means, gain, U(head), done)
            transpose(done, U(0), U(dim), U(page), out, U((n * page * heads + head) * dim), U(heads * dim))


@compiled()
def _read_means(packed: Any, start: Any, stride: Any, heads: Any, means: Any) -> Any:
    """Fills means [D, heads] from sections that lie `stride` bytes apart; whether fp32 can compute with all."""
    largest = np.float32(0)
    for head in range(U(0), heads):
        for c in range(U(0), U(len(means)) // heads):
            mean = number(_word(packed, start + head * stride + U(2) * c))
            means[c * heads + head] = mean
            largest = max(largest, abs(mean)) if mean == mean else np.float32(np.inf)
    return largest <= _LARGE


@compiled()
def _read_scales(packed: Any, start: Any, scale: Any) -> Any:
    """Whether fp32 can compute with all."""
    largest = np.float32(0)
    for t in range(U(0), U(len(scale))):
        scale[t] = from_scale16_bits(_word(packed, start + U(2) * t))
        largest = max(largest, scale[t]) if scale[t] == scale[t] else np.float32(np.inf)
    return largest <= _LARGE


@compiled()
def _word(packed: Any, at: Any) -> Any:
    return np.uint16(np.uint16(packed[at]) | np.uint16(packed[at + U(1)]) << 8)


@compiled(error_model="numpy", fastmath={"contract"})
def _finish(tile: Any, scale: Any, means: Any, gain: Any, head: Any, done: Any) -> None:
    """done = gain · (tile · scale + mean), as it is stored."""
    tokens, heads = U(len(scale)), U(len(gain))
    for c in range(U(0), U(gain.shape[1])):
        mean, factor = means[c * heads + head], gain[head, c]
        for t in range(U(0), tokens):
            done[c * tokens + t] = stored((tile[c * tokens + t] * scale[t] + mean) * factor, done)


@compiled()
def _split(packed: Any, start: Any, page: Any, keys: bool, bits: int, joined: Any, codes: Any) -> None:
    """The codes of a section; the inverse of `pack_cpu._join`."""
    size = U(len(codes))
    row = size if keys else page
    width = row >> U(1) if bits == 4 else row >> U(2)
    _get(packed, start, size // row * width, page, keys, joined)
    for a in range(U(0), size, row):
        b, c, d, at = a + width, a + U(2) * width, a + U(3) * width, a // row * width
        if bits == 4:
            for i in range(U(0), width):
                codes[a + i], codes[b + i] = joined[at + i] & 15, joined[at + i] >> 4
        else:
            for i in range(U(0), width):
                byte = joined[at + i]
                codes[a + i], codes[b + i] = byte & 3, byte >> 2 & 3
                codes[c + i], codes[d + i] = byte >> 4 & 3, byte >> 6
    if bits != 3:
        return
    half = width >> U(1)
    _get(packed, start + size // row * width, size // row * half, page, keys, joined)
    for a in range(U(0), size, half):
        group, at = a % row // width, a // row * half
        shift = U(4) * (a % width // half) + group
        for i in range(U(0), half):
            codes[a + i] |= (joined[at + i] >> shift & U(1)) << U(2)


@compiled()
def _get(packed: Any, start: Any, size: Any, page: Any, keys: bool, joined: Any) -> None:
    if keys:
        transpose(packed, start, page, size // page, joined, U(0), page)
    else:
        for i in range(U(0), size):
            joined[i] = packed[start + i]
