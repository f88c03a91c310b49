"""Figures of answers as tables and benchmarks show them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .client import Answer


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one answer took, as its client saw it. None where it is not known (one token, no transfer)."""

    prompt_tokens: int
    output_tokens: int
    ttft_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    handover_ms: float | None
    kv_bytes_bf16: int
    kv_bytes_wire: int
    ratio: float | None  # bf16 bytes for each byte on the wire
    sent_before_prefill_end: float | None  # share of the bytes on the wire, 0 to 1


def figures_of(answer: Answer) -> Figures:
    """The figures of a finished answer."""
    transfer, gaps = answer.timings.transfer, answer.itl_ms
    wire = transfer.kv_bytes_wire
    return Figures(
        prompt_tokens=answer.usage.prompt_tokens,
        output_tokens=answer.usage.output_tokens,
        ttft_ms=answer.ttft_ms,
        itl_p50_ms=percentile(gaps, 50) if gaps else None,
        itl_p99_ms=percentile(gaps, 99) if gaps else None,
        handover_ms=answer.handover_ms,
        kv_bytes_bf16=transfer.kv_bytes_bf16,
        kv_bytes_wire=wire,
        ratio=transfer.kv_bytes_bf16 / wire if wire else None,
        sent_before_prefill_end=None if transfer.partial or not wire else transfer.kv_bytes_before_prefill_end / wire,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the smallest value that `percent` of all do not exceed; nan of none."""
    if not values:
        return math.nan
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


def human_bytes(count: float) -> str:
    """A number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
