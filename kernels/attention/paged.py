"""Attention over a page table of raw and packed pages: the reference in PyTorch, and what both forms agree
on.

Shape suffixes: B sequences, Q query tokens of each, H heads (query or KV, as named), D head dimension, N
pages of a sequence, P page tokens, R slots of the raw pool, S slots of the packed pool.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages.layout import PageLayout
from ..pages.reference import unpack_reference
from ..pages.rotation import Rotations
from ..pages.unpack_cpu import packs_compiled, unpack_cpu

MAX_QUERY_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class PagedKV:
    """The KV of one layer, as the packed decode pool holds it, and where each sequence's pages lie.

    Page n of sequence b is packed where packed_from_B[b] <= n < packed_to_B[b]; its slot in the packed
    pool, or else in the raw pool, is table_BN[b, n]. A packed page is full, and all of its tokens are older
    than the oldest query token.
    """

    raw_k_RPHD: Tensor  # bf16, fp16 or fp32
    raw_v_RPHD: Tensor
    packed_SB: Tensor  # uint8 [S, KV heads * head_bytes]
    table_BN: Tensor  # int32
    packed_from_B: Tensor  # int32
    packed_to_B: Tensor  # int32
    lengths_B: Tensor  # int32: tokens in the cache, the query tokens among them (they are the newest)
    layout: PageLayout


def paged_attention_reference(
    q_BQHD: Tensor, kv: PagedKV, rotations: Rotations, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of the newest Q tokens of each sequence over all of its pages.

    `window`: a token sees itself and the window - 1 tokens before it; None: everything before it. Returns
    the output [B, Q, query heads, D] in the dtype of `q_BQHD` and the log-sum-exp (natural logarithm) of
    the scores, float32 [B, Q, query heads].
    """
    out = torch.empty_like(q_BQHD)
    lse = torch.empty(q_BQHD.shape[:3], dtype=torch.float32, device=q_BQHD.device)
    for b in range(q_BQHD.shape[0]):
        k_THD, v_THD = gather_sequence(kv, rotations, b)
        out[b], lse[b] = _attend(q_BQHD[b], k_THD, v_THD, scale, window)
    return out, lse


def gather_sequence(kv: PagedKV, rotations: Rotations, sequence: int) -> tuple[Tensor, Tensor]:
    """Dense float32 keys and values [T, KV heads, D] of one sequence."""
    page, length = kv.layout.page_tokens, int(kv.lengths_B[sequence])
    pages = -(-length // page)
    start, end = int(kv.packed_from_B[sequence]), min(int(kv.packed_to_B[sequence]), pages)
    slots = kv.table_BN[sequence, :pages].long()
    packed_NB = kv.packed_SB[slots[start:end]]
    # The packed pool of a CPU is read here at every step.
    compiled = packed_NB.device.type == "cpu" and packs_compiled(torch.float32)
    packed = (unpack_cpu if compiled else unpack_reference)(packed_NB, rotations, kv.layout, torch.float32)
    parts = []
    for pool, middle in zip((kv.raw_k_RPHD, kv.raw_v_RPHD), packed, strict=True):
        head, tail = (
            pool[slots[rows]].float().flatten(0, 1) for rows in (slice(0, start), slice(max(start, end), pages))
        )
        parts.append(torch.cat([head, middle, tail])[:length])
    return parts[0], parts[1]


def _attend(q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    queries, heads, dim = q_QHD.shape
    length, kv_heads = k_THD.shape[:2]
    q = q_QHD.float().view(queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("qhgd,thd->hgqt", q, k_THD) * scale
    query_at = torch.arange(length - queries, length, device=q.device)[:, None]
    key_at = torch.arange(length, device=q.device)[None, :]
    hidden = (key_at > query_at) | (key_at <= query_at - (window or length + 1))
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("hgqt,thd->qhgd", (scores - lse[..., None]).exp(), v_THD)
    return out.flatten(1, 2).to(q_QHD.dtype), lse.permute(2, 0, 1).flatten(1)
