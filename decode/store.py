"""Where the KV of running requests lies: the interface of the two pools, and the dense one.

Whatever the pool, a request's pages hold the same numbers: the first page, the last full one and the one that fills
are raw, every other page has gone through the request's codec. The packed pool keeps such a page packed; the dense
pool keeps what unpacking it gives, so that a step reads plain rows.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.attention import Span, ragged_attention
from ..kvtransfer.allocator import Run
from ..kvtransfer.page import Section, packed_range
from ..kvtransfer.pool import DensePool
from ..kvtransfer.receiver import KvReceiver, ReceivedSection
from ..model.model import Model
from ..proto.errors import IsthmusError
from ..proto.worker_pb2 import PageCounts
from .scheduler import SequenceId
from .sequence import Advance, DecodeSequence

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


class KvStore(Protocol):
    """Pages of all requests of a decode worker. The engine thread alone uses it.

    A request owns pages from `admit` to `release`; nobody else frees them.
    """

    @property
    def total_pages(self) -> int: ...

    @property
    def free_pages(self) -> int: ...

    def counts(self) -> PageCounts:
        """For reports."""
        ...

    def admit(self, sequence: DecodeSequence, pages: int) -> None:
        """Reserves that many pages, which must be free, for everything the request can come to hold."""
        ...

    def release(self, sequence: DecodeSequence) -> None:
        """Frees all pages of a request; harmless where it has none."""
        ...

    def receive(self, sequence: DecodeSequence, receiver: KvReceiver, section: ReceivedSection) -> None:
        """Stores a checked section of the prompt. Corrupt where the codec finds that its bytes are not pages."""
        ...

    def put(self, sequence: DecodeSequence, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor) -> None:
        """Stores a section of a prompt that was computed here, in the form that it has in the pool.

        InvalidRequest where a page cannot be packed (a NaN, say).
        """
        ...

    def begin_step(self, work: Sequence[Advance]) -> Attend:
        """The attention callback of one step: stores the tokens of each request, in order, and attends with them."""
        ...

    def end_step(self, work: Sequence[Advance]) -> list[tuple[DecodeSequence, IsthmusError]]:
        """Packs the pages that the step made old; returns the requests for which that cannot be done (a NaN, say)."""
        ...


def page_to_pack(advance: Advance, page_tokens: int) -> int | None:
    """The page that is neither first nor newest any more once the step's tokens are stored, if there is one."""
    sequence, stored = advance.sequence, advance.end
    if stored % page_tokens or stored <= len(sequence.prompt):
        return None
    start, end = packed_range(stored, page_tokens, sequence.codec.packs)
    return end // page_tokens - 1 if start < end else None


class DenseStore:
    """One row for each token and layer, in the dtype of the computation."""

    def __init__(self, model: Model, pages: int, page_tokens: int) -> None:
        self._model = model
        self._pool = DensePool(model.layers, pages, page_tokens, dtype=model.dtype, device=model.device)
        self._runs: dict[SequenceId, tuple[Run, ...]] = {}

    @property
    def total_pages(self) -> int:
        return self._pool.allocator.total

    @property
    def free_pages(self) -> int:
        return self._pool.allocator.free

    def counts(self) -> PageCounts:
        return self._pool.counts()

    def admit(self, sequence: DecodeSequence, pages: int) -> None:
        runs = self._pool.allocator.take(pages)
        assert runs is not None, "the scheduler admitted a request that does not fit"
        self._runs[sequence.id] = runs

    def release(self, sequence: DecodeSequence) -> None:
        self._pool.allocator.give_back(self._runs.pop(sequence.id, ()))

    def receive(self, sequence: DecodeSequence, receiver: KvReceiver, section: ReceivedSection) -> None:
        header = section.header
        keys, values = receiver.decode(section, self._model.dtype)
        self._pool.write(header.layer, self._runs[sequence.id], header.start, keys, values)

    def put(self, sequence: DecodeSequence, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor) -> None:
        if section.packed:
            packed = sequence.codec.encode(layer, keys_THD, values_THD)
            keys_THD, values_THD = sequence.codec.decode(layer, packed, self._model.dtype)
        self._pool.write(layer, self._runs[sequence.id], section.start, keys_THD, values_THD)

    def begin_step(self, work: Sequence[Advance]) -> Attend:
        pool, windows = self._pool, [layer.window for layer in self._model.layers]
        spans, slots = [], []
        for advance in work:
            runs, start, end = self._runs[advance.sequence.id], advance.start, advance.end
            stretches = tuple(pool.slots(runs, 0, end))
            spans.append(Span(len(slots), end - start, start, stretches))
            slot, tokens = stretches[-1]
            if end - start <= tokens:
                slots += range(slot + tokens - (end - start), slot + tokens)
            else:
                slots += (at for slot, tokens in pool.slots(runs, start, end) for at in range(slot, slot + tokens))
        slots_B, spans_B = torch.tensor(slots, device=self._model.device), tuple(spans)

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            keys, values = pool.keys[layer], pool.values[layer]
            keys.index_copy_(0, slots_B, k_THD)
            values.index_copy_(0, slots_B, v_THD)
            return ragged_attention(q_THD, keys, values, spans_B, scale, windows[layer])

        return attend

    def end_step(self, work: Sequence[Advance]) -> list[tuple[DecodeSequence, IsthmusError]]:
        failed, page_tokens = [], self._pool.page_tokens
        for advance in work:
            page = page_to_pack(advance, page_tokens)
            try:
                if page is not None:
                    self._round_trip(advance.sequence, page * page_tokens)
            except IsthmusError as error:
                failed.append((advance.sequence, error))
        return failed

    def _round_trip(self, sequence: DecodeSequence, start: int) -> None:
        runs, codec = self._runs[sequence.id], sequence.codec
        for layer in range(len(self._model.layers)):
            keys, values = self._pool.read(layer, runs, start, start + self._pool.page_tokens)
            packed = codec.encode(layer, keys, values)
            self._pool.write(layer, runs, start, *codec.decode(layer, packed, self._model.dtype))
