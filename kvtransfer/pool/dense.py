"""The dense pool: KV of many sequences in one tensor per layer, addressed by page.

Used by prefill workers, and by decode workers on a CPU, where a packed page is unpacked once, on arrival.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.attention.dense import gather_slots
from ...kernels.shapes import LayerShape
from ...proto.worker_pb2 import PageCounts
from .allocator import PageAllocator, Run


class DensePool:
    """Keys and values per layer, [tokens of all pages, KV heads, D] each; consecutive pages are contiguous.

    One thread (the engine's) uses it. Memory is committed by the system as pages are first written.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        pages: int,
        page_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.page_tokens = page_tokens
        self.allocator = PageAllocator(pages)
        shapes = [(pages * page_tokens, layer.kv_heads, layer.head_dim) for layer in layers]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]

    def counts(self) -> PageCounts:
        """For reports."""
        allocator = self.allocator
        return PageCounts(total=allocator.total, free=allocator.free, in_use=allocator.in_use)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_tokens)

    def slots(self, runs: tuple[Run, ...], start: int, end: int) -> list[tuple[int, int]]:
        """Where the tokens [start, end) of a sequence lie: (first slot, tokens) ranges in order.

        A slot is a row of the layer tensors; `runs` are the sequence's pages.
        """
        ranges, position = [], 0
        for run in runs:
            tokens = run.pages * self.page_tokens
            low, high = max(start, position), min(end, position + tokens)
            if low < high:
                ranges.append((run.first * self.page_tokens + low - position, high - low))
            position += tokens
        return ranges

    def read(self, layer: int, runs: tuple[Run, ...], start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens [start, end), [T, KV heads, D] each; views where they are contiguous."""
        ranges = self.slots(runs, start, end)
        return gather_slots(self.keys[layer], ranges), gather_slots(self.values[layer], ranges)

    def write(self, layer: int, runs: tuple[Run, ...], start: int, keys_THD: Tensor, values_THD: Tensor) -> None:
        """Stores tokens from position `start` on, converted to the pool's dtype."""
        done = 0
        for slot, tokens in self.slots(runs, start, start + len(keys_THD)):
            self.keys[layer][slot : slot + tokens] = keys_THD[done : done + tokens]
            self.values[layer][slot : slot + tokens] = values_THD[done : done + tokens]
            done += tokens


def pages_in(
    layers: Sequence[LayerShape], page_tokens: int, dtype: torch.dtype, *, gib: float, tokens: int | None
) -> int:
    """How many pages a pool gets: those of `tokens` where given, else what fits in `gib`; at least one."""
    if tokens is None:
        tokens = int(gib * (1 << 30)) // token_bytes(layers, dtype.itemsize)
    return max(1, tokens // page_tokens)


def token_bytes(layers: Sequence[LayerShape], itemsize: int) -> int:
    """Of the keys and values of one token, over all layers."""
    return sum(2 * layer.kv_heads * layer.head_dim for layer in layers) * itemsize
