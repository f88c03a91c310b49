"""Causal attention of a chunk of a prompt on a CPU, whose result does not depend on where the chunk begins and ends.

PyTorch's flash kernel gives a row of queries the same bits whatever other rows there are, as long as the keys that it
is called with have the same length, that is a multiple of 256, and the rows fill the blocks of 32 or 64 that it cuts
them into. So queries go in blocks that begin at multiples of 256 in their sequence, with keys up to the end of the
block, zeros where there are none, and a mask. A prompt that is cut at other places, shares its steps with others or
begins on kept pages comes out the same to the bit.

Shape suffixes: T new tokens, S slots of the pool, H heads (query heads or KV heads, as named), G query heads per KV
head, N keys, D head dimension.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .scratch import scratch

_BLOCK = 256  # queries of one call, and what the number of keys is a multiple of


def chunk_attention(
    q_THD: Tensor,
    keys_SHD: Tensor,
    values_SHD: Tensor,
    past: int,
    stretches: Sequence[tuple[int, int]],
    scale: float,
    window: int | None,
) -> Tensor:
    """The new tokens [past, past + T) of one sequence attend to all tokens up to themselves, or to the last `window`.

    `stretches`: (first slot, tokens) of its past and new tokens, in order. fp32 or bf16, the same for all three.
    Returns [T, query heads, D].
    """
    new, heads, dim = q_THD.shape
    total, kv_heads = past + new, keys_SHD.shape[1]
    groups = heads // kv_heads
    k_HND, v_HND = (
        _gathered(name, rows, stretches, total) for name, rows in (("keys", keys_SHD), ("values", values_SHD))
    )
    out_THD = torch.empty_like(q_THD)
    for block in range(past - past % _BLOCK, total, _BLOCK):
        first, end = max(past, block), min(total, block + _BLOCK)
        start = 0 if window is None else max(0, block - window + 1) // _BLOCK * _BLOCK
        # KV heads are the batch, the group is the head dimension: K and V are shared by a stride of zero.
        k_HGND, v_HGND = (x[:, None, start : block + _BLOCK].expand(-1, groups, -1, -1) for x in (k_HND, v_HND))
        rows = slice(first - past, end - past)
        q_HGTD = _filled(q_THD[rows]).view(-1, kv_heads, groups, dim).permute(1, 2, 0, 3)
        rows_keys = q_HGTD.shape[2], block + _BLOCK - start
        mask = remembered_band(first - start, *rows_keys, window, q_THD.dtype, q_THD.device)
        # The public function may choose another kernel.
        out_HGTD, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_HGTD, k_HGND, v_HGND, 0.0, False, attn_mask=mask, scale=scale
        )
        out_THD[rows].view(-1, kv_heads, groups, dim).copy_(out_HGTD.permute(2, 0, 1, 3)[: end - first])
    return out_THD


def _filled(q_THD: Tensor) -> Tensor:
    """With rows of zeros after them until the kernel's blocks of rows are full."""
    rows = len(q_THD)
    block = 32 if rows <= 160 else 64
    missing = -rows % block
    return q_THD if not missing else torch.cat((q_THD, q_THD.new_zeros(missing, *q_THD.shape[1:])))


def _gathered(name: str, rows_SHD: Tensor, stretches: Sequence[tuple[int, int]], total: int) -> Tensor:
    """[H, N, D] with N a multiple of a block: the rows of the stretches, then zeros."""
    padded = -(-total // _BLOCK) * _BLOCK
    out_HND = scratch(f"chunk {name}", (rows_SHD.shape[1], padded, rows_SHD.shape[2]), rows_SHD.dtype, rows_SHD.device)
    place = 0
    for slot, tokens in stretches:
        out_HND[:, place : place + tokens] = rows_SHD[slot : slot + tokens].transpose(0, 1)
        place += tokens
    out_HND[:, total:] = 0
    return out_HND


def causal_band(
    first: int, rows: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The additive mask [rows, keys]: 0 where the query at the place first + row sees the key, else -inf."""
    query_at = torch.arange(first, first + rows, device=device).unsqueeze(1)
    key_at = torch.arange(keys, device=device).unsqueeze(0)
    hidden = (key_at > query_at) | (key_at <= query_at - (window or first + rows))
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


remembered_band = lru_cache(maxsize=8)(causal_band)  # all layers of a step ask for the same
