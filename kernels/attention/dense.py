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

from .chunk import cached_band, chunk_attention
from .decode import SlotRanges, decode_attention


@dataclass(frozen=True)
class Span:
    """The new tokens of one sequence in a batch, and where all of its KV lies."""

    row: int  # of its first new token in the batch
    new: int  # how many new tokens
    past: int  # tokens of the sequence before them
    slot_ranges: tuple[tuple[int, int], ...]  # (first slot, tokens): past + new tokens, in order
    # Output: each token attends as in a step of its own, so that output which is replayed comes out the same to the
    # bit. Else part of a prompt.
    output: bool = False


def ragged_attention(
    q_THD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, spans: Sequence[Span], scale: float, window: int | None
) -> Tensor:
    """Causal attention of every new token over its own sequence, which the pool already holds.

    `spans` cover the rows of `q_THD` in order. `window`: a token sees itself and the window - 1 tokens before it;
    None: everything before it. Returns [T, query heads, D] in the dtype of `q_THD`. On a CPU a token's result does not
    depend on the other spans, nor on how its sequence was cut into spans.
    """
    if q_THD.device.type == "cpu":
        return _on_cpu(q_THD, keys_SHD, values_SHD, spans, scale, window)
    outs = [span_attention(q_THD, keys_SHD, values_SHD, span, scale, window) for span in spans]
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _on_cpu(
    q_THD: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span], scale: float, window: int | None
) -> Tensor:
    """All tokens of outputs in one call, the chunks of prompts one after the other."""
    prompts = [span for span in spans if not span.output]
    if not prompts:
        return decode_attention(q_THD, keys, values, _slot_ranges(spans, window), scale)
    out_THD = torch.empty_like(q_THD)
    for span in prompts:
        rows = slice(span.row, span.row + span.new)
        out_THD[rows] = chunk_attention(q_THD[rows], keys, values, span.past, span.slot_ranges, scale, window)
    outputs = [span for span in spans if span.output]
    if outputs:
        rows_B = [row for span in outputs for row in range(span.row, span.row + span.new)]
        out_THD[rows_B] = decode_attention(q_THD[rows_B], keys, values, _slot_ranges(spans, window), scale)
    return out_THD


def span_attention(
    q_THD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, span: Span, scale: float, window: int | None
) -> Tensor:
    """One span's part of `ragged_attention`, as a GPU does it (any device can): [its new tokens, query heads, D].

    Without a window, or within it, FlashAttention (Dao, arXiv 2307.08691) serves a chunk of bf16 or fp16: no tensor of
    the size of queries times keys is ever made.
    """
    q_THD = q_THD[span.row : span.row + span.new]
    # Every query head of a group is a query row of its KV head, so that K and V are shared by a stride of zero.
    q_THGD = q_THD.view(span.new, keys_SHD.shape[1], -1, q_THD.shape[2])
    pools = keys_SHD, values_SHD
    if span.new == 1:  # a decode step reads K and V once
        k, v = (gather_slots(pool, _visible(span, 1, window)).transpose(0, 1).unsqueeze(0) for pool in pools)
        return F.scaled_dot_product_attention(q_THGD, k, v, scale=scale).view(q_THD.shape)
    q_HGTD = q_THGD.permute(1, 2, 0, 3)
    k, v = (
        gather_slots(pool, span.slot_ranges).transpose(0, 1).unsqueeze(1).expand(-1, q_HGTD.shape[1], -1, -1)
        for pool in pools
    )
    total = span.past + span.new
    if window is None or total <= window:
        from torch.nn.attention.bias import causal_lower_right  # imports the compiler: 3 s, for which a CPU has no use

        mask = causal_lower_right(span.new, total)
    else:  # PyTorch has no window for FlashAttention; no wider than the chunk and the window, one for all layers
        start = max(0, span.past - window + 1)
        k, v = k[:, :, start:], v[:, :, start:]
        mask = cached_band(span.past - start, span.new, total - start, window, q_THD.dtype, q_THD.device)
    out = F.scaled_dot_product_attention(q_HGTD, k, v, attn_mask=mask, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(q_THD.shape)


class _Last(threading.local):
    """The slot ranges of the last step of this thread, by window: all layers of a step ask for the same."""

    spans: tuple[Span, ...] | None = None
    by_window: dict[int | None, SlotRanges]


_last = _Last()


def _slot_ranges(spans: Sequence[Span], window: int | None) -> SlotRanges:
    """What each new token of outputs sees. A tuple is remembered until another comes; a list may have been changed."""
    if not isinstance(spans, tuple):
        return _gather(spans, window)
    if _last.spans is not spans:
        _last.spans, _last.by_window = spans, {}
    if window not in _last.by_window:
        _last.by_window[window] = _gather(spans, window)
    return _last.by_window[window]


def _gather(spans: Sequence[Span], window: int | None) -> SlotRanges:
    outputs = [span for span in spans if span.output]
    return SlotRanges.of([_visible(span, new, window) for span in outputs for new in range(1, span.new + 1)])


def _visible(span: Span, new: int, window: int | None) -> tuple[tuple[int, int], ...]:
    """The slot ranges that the last of the first `new` new tokens of a span sees."""
    end = span.past + new
    start = 0 if window is None else max(0, end - window)
    if start == 0 and new == span.new:
        return span.slot_ranges
    visible, position = [], 0
    for slot, tokens in span.slot_ranges:
        first, last = max(start, position), min(end, position + tokens)
        if first < last:
            visible.append((slot + first - position, last - first))
        position += tokens
    return tuple(visible)


def gather_slots(pool_SHD: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The slots of (first slot, tokens) ranges, in order: [T, H, D], a view where there is one range only."""
    parts = [pool_SHD[slot : slot + tokens] for slot, tokens in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
