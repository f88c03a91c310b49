"""Attention of a ragged batch over a dense pool, in PyTorch.

Shape suffixes: T tokens of the batch, S slots of the pool, H heads (query heads or KV heads, as named), D head
dimension, G query heads per KV head.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .decode_attention import Stretches, decode_attention


@dataclass(frozen=True)
class Span:
    """The new tokens of one sequence in a batch, and where all of its KV lies."""

    row: int  # of its first new token in the batch
    new: int  # how many new tokens
    past: int  # tokens of the sequence before them
    stretches: tuple[tuple[int, int], ...]  # (first slot, tokens): past + new tokens, in order


def ragged_attention(
    q_THD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, spans: Sequence[Span], scale: float, window: int | None
) -> Tensor:
    """Causal attention of every new token over its own sequence, which the pool already holds.

    `spans` cover the rows of `q_THD` in order. `window`: a token sees itself and the window - 1 tokens before it;
    None: everything before it. Returns [T, query heads, D] in the dtype of `q_THD`.
    """
    if q_THD.device.type == "cpu":
        return _on_cpu(q_THD, keys_SHD, values_SHD, spans, scale, window)
    outs = [_one(q_THD, keys_SHD, values_SHD, span, scale, window) for span in spans]
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _on_cpu(
    q_THD: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span], scale: float, window: int | None
) -> Tensor:
    """All sequences of one new token in one call, the others one after the other."""
    chunks = [span for span in spans if span.new > 1]
    if not chunks:
        return decode_attention(q_THD, keys, values, _stretches(spans, window), scale)
    if len(spans) == 1:
        return _chunk(q_THD, keys, values, spans[0], scale, window)
    out_THD = torch.empty_like(q_THD)
    for span in chunks:
        rows = slice(span.row, span.row + span.new)
        out_THD[rows] = _chunk(q_THD[rows], keys, values, span, scale, window)
    singles = [span for span in spans if span.new == 1]
    if singles:
        rows_B = [span.row for span in singles]
        out_THD[rows_B] = decode_attention(q_THD[rows_B], keys, values, _stretches(singles, window), scale)
    return out_THD


def _one(q_THD: Tensor, keys: Tensor, values: Tensor, span: Span, scale: float, window: int | None) -> Tensor:
    """One sequence on a GPU: [its new tokens, query heads, D]."""
    if span.new > 1:
        return _chunk(q_THD[span.row : span.row + span.new], keys, values, span, scale, window)
    # Every query head of a group is a query row of its KV head, so that a decode step reads K and V once.
    q_1HGD = q_THD[span.row].view(1, keys.shape[1], -1, q_THD.shape[2])
    k, v = (contiguous(rows, _visible(span, window)).transpose(0, 1).unsqueeze(0) for rows in (keys, values))
    return F.scaled_dot_product_attention(q_1HGD, k, v, scale=scale).view(1, *q_THD.shape[1:])


class _Last(threading.local):
    """The stretches of the last step of this thread, by window: all layers of a step ask for the same."""

    spans: tuple[Span, ...] | None = None
    by_window: dict[int | None, Stretches]


_last = _Last()


def _stretches(spans: Sequence[Span], window: int | None) -> Stretches:
    """What the newest tokens see. A tuple is remembered until another one comes; a list could have been changed."""
    if not isinstance(spans, tuple):
        return Stretches.gather([_visible(span, window) for span in spans])
    if _last.spans is not spans:
        _last.spans, _last.by_window = spans, {}
    if window not in _last.by_window:
        _last.by_window[window] = Stretches.gather([_visible(span, window) for span in spans])
    return _last.by_window[window]


def _visible(span: Span, window: int | None) -> tuple[tuple[int, int], ...]:
    """The stretches that the newest token of a span sees."""
    if window is None or span.past + span.new <= window:
        return span.stretches
    skip = span.past + span.new - window
    visible = []
    for slot, tokens in span.stretches:
        if skip < tokens:
            visible.append((slot + skip, tokens - skip))
        skip = max(0, skip - tokens)
    return tuple(visible)


def _chunk(q_THD: Tensor, keys: Tensor, values: Tensor, span: Span, scale: float, window: int | None) -> Tensor:
    """Several new tokens: what lies before them unmasked, themselves causally, merged by log-sum-exp."""
    new, heads, dim = q_THD.shape
    groups = heads // keys.shape[1]
    # KV heads are the batch, the group is the head dimension: K and V are shared by a stride of zero.
    q = q_THD.view(new, -1, groups, dim).permute(1, 2, 0, 3)
    k, v = (
        contiguous(rows, span.stretches).transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)
        for rows in (keys, values)
    )
    past, total = span.past, span.past + new
    if (window is not None and total > window) or (past and not _merges(q)):
        start = 0 if window is None else max(0, past - window + 1)
        mask = _band(past, total, start, window, q)
        parts = [_attend(q, k[:, :, start:], v[:, :, start:], scale, mask=mask)]
    else:
        parts = [_attend(q, k[:, :, past:], v[:, :, past:], scale, causal=True)]
        if past:
            parts.append(_attend(q, k[:, :, :past], v[:, :, :past], scale))
    return _merge(parts).permute(2, 0, 1, 3).reshape(new, heads, dim)


def _band(past: int, total: int, start: int, window: int | None, like: Tensor) -> Tensor:
    """The additive mask [total - past, total - start] of a causal band of width `window`."""
    query_at = torch.arange(past, total, device=like.device).unsqueeze(1)
    key_at = torch.arange(start, total, device=like.device).unsqueeze(0)
    hidden = (key_at > query_at) | (key_at <= query_at - (window or total))
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def contiguous(rows: Tensor, stretches: Sequence[tuple[int, int]]) -> Tensor:
    """The rows of (first row, rows) stretches, in order; a view where there is only one."""
    parts = [rows[slot : slot + tokens] for slot, tokens in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _merges(q: Tensor) -> bool:
    """Whether `_attend` returns the log-sum-exp that merging needs; elsewhere there is one part only."""
    return q.device.type == "cpu"


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One attention call: the output [B, H, T, D] and, on a CPU, the log-sum-exp [B, H, T]."""
    if _merges(q):
        # The public function drops the log-sum-exp, which this one returns.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale), None


def _merge(parts: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Joins attention over disjoint sets of keys (FlashAttention-2, section 3.1)."""
    if len(parts) == 1:
        return parts[0][0]
    outs = torch.stack([out for out, _ in parts])
    lse = torch.stack([lse for _, lse in parts if lse is not None])
    return (torch.softmax(lse, dim=0).unsqueeze(-1).to(outs.dtype) * outs).sum(dim=0)
