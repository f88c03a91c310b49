"""Causal attention of a chunk of a prompt on a CPU, whose result does not depend on where the chunk begins and ends.

PyTorch's flash kernel gives a row of queries the same bits whatever other rows there are, as long as the keys that it
is called with have the same length, that is a multiple of 256, and the rows fill the blocks of 32 or 64 that it cuts
them into. So queries go in blocks that begin at multiples of 256 in their sequence, with keys up to the end of the
block, zeros where there are none, and a mask. A prompt that is cut at other places, shares its steps with others or
begins on kept pages comes out the same to the bit. Where that kernel, which is no public one, is not used, plain
products of whole blocks promise the same.

Shape suffixes: T new tokens, S slots of the pool, H heads (query heads or KV heads, as named), G query heads per KV
head, N keys, D head dimension.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache, partial
from math import prod

import torch
from torch import Tensor

from ..fast_paths import FastPath, alike, spread

_BLOCK = 256  # queries of one call, and what the number of keys is a multiple of


def chunk_attention(
    q_THD: Tensor,
    keys_SHD: Tensor,
    values_SHD: Tensor,
    past: int,
    slot_ranges: Sequence[tuple[int, int]],
    scale: float,
    window: int | None,
) -> Tensor:
    """The new tokens [past, past + T) of one sequence attend to all tokens up to themselves, or to the last `window`.

    `slot_ranges`: (first slot, tokens) of its past and new tokens, in order. fp32 or bf16, the same for all three.
    Returns [T, query heads, D].
    """
    new, heads, dim = q_THD.shape
    total, kv_heads = past + new, keys_SHD.shape[1]
    groups = heads // kv_heads
    k_HND, v_HND = (
        _gathered(name, pool, slot_ranges, total) for name, pool in (("keys", keys_SHD), ("values", values_SHD))
    )
    attend = _flash if has_flash(q_THD.dtype) else _plain
    out_THD = torch.empty_like(q_THD)
    for block in range(past - past % _BLOCK, total, _BLOCK):
        first, end = max(past, block), min(total, block + _BLOCK)
        start = 0 if window is None else max(0, block - window + 1) // _BLOCK * _BLOCK
        # KV heads are the batch, the group is the head dimension: K and V are shared by a stride of zero.
        k_HGND, v_HGND = (x[:, None, start : block + _BLOCK].expand(-1, groups, -1, -1) for x in (k_HND, v_HND))
        rows = slice(first - past, end - past)
        out_HGTD = attend(q_THD[rows], k_HGND, v_HGND, first - block, block - start, scale, window)
        out_THD[rows].view(-1, kv_heads, groups, dim).copy_(out_HGTD.permute(2, 0, 1, 3))
    return out_THD


def _flash(
    q_THD: Tensor, k_HGND: Tensor, v_HGND: Tensor, row: int, before: int, scale: float, window: int | None
) -> Tensor:
    """[H, G, T, D] of the rows from `row` of a block that `before` of the keys stand before."""
    q_HGTD = _grouped(_filled(q_THD), k_HGND)
    mask = cached_band(before + row, q_HGTD.shape[2], k_HGND.shape[2], window, q_THD.dtype, q_THD.device)
    # The public function may choose another kernel.
    out_HGTD, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_HGTD, k_HGND, v_HGND, 0.0, False, attn_mask=mask, scale=scale
    )
    return out_HGTD[:, :, : len(q_THD)]


def _plain(
    q_THD: Tensor, k_HGND: Tensor, v_HGND: Tensor, row: int, before: int, scale: float, window: int | None
) -> Tensor:
    """The same in fp32 products of whole blocks: each row in its place, so that it comes out the same to the bit."""
    block_THD = q_THD.new_zeros(_BLOCK, *q_THD.shape[1:])
    block_THD[row : row + len(q_THD)] = q_THD
    mask = cached_band(before, _BLOCK, k_HGND.shape[2], window, torch.float32, q_THD.device)
    scores_HGTN = _grouped(block_THD, k_HGND).float().contiguous() @ k_HGND[:, :1].float().transpose(2, 3) * scale
    out_HGTD = (scores_HGTN + mask).softmax(-1) @ v_HGND[:, :1].float()
    return out_HGTD[:, :, row : row + len(q_THD)].to(q_THD.dtype)


def _grouped(q_THD: Tensor, k_HGND: Tensor) -> Tensor:
    """[H, G, T, D]"""
    heads, groups = k_HGND.shape[:2]
    return q_THD.view(-1, heads, groups, q_THD.shape[2]).permute(1, 2, 0, 3)


def has_flash(dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernel is used for that dtype; the first call tries it."""
    path = _TRIED.get(dtype)
    return path is not None and path()


def _works(dtype: torch.dtype) -> bool:
    """5 rows of a block, in its middle, and one block before; 2 KV heads for 4 query heads."""
    q_THD, k_HND, v_HND = spread(5, 4, 16, dtype=dtype), *spread(2, 2, 2 * _BLOCK, 16, dtype=dtype)
    k_HGND, v_HGND = (x[:, None].expand(-1, 2, -1, -1) for x in (k_HND, v_HND + 1))
    fast, plain = (attend(q_THD, k_HGND, v_HGND, 40, _BLOCK, 0.5, 300) for attend in (_flash, _plain))
    return alike(fast, plain, 1e-5 if dtype == torch.float32 else 1e-2)


_TRIED = {
    dtype: FastPath(f"PyTorch's flash kernel in {name}", partial(_works, dtype))
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}


def _filled(q_THD: Tensor) -> Tensor:
    """With rows of zeros after them until the kernel's blocks of rows are full."""
    rows = len(q_THD)
    block = 32 if rows <= 160 else 64
    missing = -rows % block
    return q_THD if not missing else torch.cat((q_THD, q_THD.new_zeros(missing, *q_THD.shape[1:])))


def _gathered(name: str, pool_SHD: Tensor, slot_ranges: Sequence[tuple[int, int]], total: int) -> Tensor:
    """[H, N, D] with N a multiple of a block: the slots of the ranges, then zeros."""
    padded = -(-total // _BLOCK) * _BLOCK
    out_HND = _reused(name, (pool_SHD.shape[1], padded, pool_SHD.shape[2]), pool_SHD.dtype)
    position = 0
    for slot, tokens in slot_ranges:
        out_HND[:, position : position + tokens] = pool_SHD[slot : slot + tokens].transpose(0, 1)
        position += tokens
    out_HND[:, total:] = 0
    return out_HND


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def _reused(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in memory that this thread uses again for the same name.

    With fresh memory, which the system has to map and to clear, a chunk of 128 or 256 tokens after 1,792 to 3,000 took
    8 to 11 % longer with 8 KV heads of 128, up to 13 % with 3 of 64 (fp32, one thread, 2026-11-29).
    """
    size = prod(shape)
    flat = _buffers.by_use.get((name, dtype))
    if flat is None or flat.numel() < size:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            flat = _buffers.by_use[name, dtype] = torch.empty(size, dtype=dtype)
    return flat[:size].view(shape)


def causal_band(
    first: int, rows: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The additive mask [rows, keys]: 0 where the query at the place first + row sees the key, else -inf."""
    query_at = torch.arange(first, first + rows, device=device).unsqueeze(1)
    key_at = torch.arange(keys, device=device).unsqueeze(0)
    hidden = (key_at > query_at) | (key_at <= query_at - (window or first + rows))
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


cached_band = lru_cache(maxsize=8)(causal_band)  # all layers of a step ask for the same
