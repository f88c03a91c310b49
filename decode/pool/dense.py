"""The dense pool: one row for each token and layer, in the dtype of the computation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.attention.dense import Span, ragged_attention
from ...kvtransfer.codecs.checks import check_finite
from ...kvtransfer.page import Section
from ...kvtransfer.pool.allocator import Run
from ...kvtransfer.pool.dense import DensePool
from ...kvtransfer.pool.table import PageTable, runs_of
from ...kvtransfer.receiver import KvReceiver, ReceivedSection
from ...model.model import Model
from ...proto.errors import IsthmusError
from ...proto.worker_pb2 import PageCounts
from ...worker.out_of_memory import no_memory
from ..sequences.pages import final_pages, page_to_pack
from ..sequences.scheduler import SequenceId
from ..sequences.sequence import Advance, DecodeSequence
from .base import Attend
from .raw_pages import RawPages
from .saved import SavedPages

GROW_AHEAD = 4  # pages that a request takes beyond the next one while pages are empty, so that they lie together


class DenseStore:
    """See `KvStore`. A packed page is unpacked once, on arrival."""

    def __init__(self, model: Model, pages: int, page_tokens: int, *, cached_pages: int) -> None:
        self._model = model
        self._pool = DensePool(model.layers, pages, page_tokens, dtype=model.dtype, device=model.device)
        self._shared = PageTable(self._pool.allocator, cached_pages)
        self._raw = RawPages(self._pool, self._shared)
        self._failed: dict[SequenceId, tuple[DecodeSequence, IsthmusError]] = {}  # in the step that runs
        self._pages: dict[SequenceId, list[int]] = {}
        self._runs: dict[SequenceId, tuple[Run, ...]] = {}  # the same pages

    @property
    def total_pages(self) -> int:
        return self._pool.allocator.total

    @property
    def in_use(self) -> int:
        return self._shared.in_use

    @property
    def free(self) -> int:
        return self._shared.free

    def pages_for(self, tokens: int) -> int:
        return self._pool.pages_for(tokens)

    def pages_of(self, sequence: DecodeSequence) -> int:
        return len(self._pages.get(sequence.id, ()))

    @property
    def used_bytes(self) -> tuple[int, int]:
        return (self._shared.in_use + self._shared.cached) * self.saved_page_bytes, 0

    def counts(self) -> PageCounts:
        shared = self._shared
        return PageCounts(total=self.total_pages, free=shared.empty, cached=shared.cached, in_use=shared.in_use)

    def admit(self, sequence: DecodeSequence, tokens: int, wished_tokens: int) -> bool:
        page_tokens = self._pool.page_tokens
        held = self._shared.share_first(sequence.holdable_addresses(page_tokens))
        pages, wished = (self.pages_for(some) - len(held) for some in (tokens, wished_tokens))
        after = held[-1] if held else None
        raw = self._raw.hold(sequence.raw_address(page_tokens, len(held)))
        rest = self._shared.take(max(pages, min(wished, self._shared.empty)), after)
        if rest is None and raw is not None:  # the copy may be the very page that is missing
            self._raw.give_back(raw)
            raw, rest = None, self._shared.take(pages, after)
        if rest is not None:
            sequence.held = (len(held) + (raw is not None)) * page_tokens
            self._set(sequence, held + rest)
            if raw is not None:
                self._raw.fill(raw, self._runs[sequence.id], len(held))
        else:
            self._shared.release(held)
        if raw is not None:
            self._raw.give_back(raw)
        return rest is not None

    def grow(self, sequence: DecodeSequence, tokens: int) -> bool:
        pages = self._pages[sequence.id]
        missing = self.pages_for(tokens) - len(pages)
        if missing > 0:
            more = self._shared.take(max(missing, min(missing + GROW_AHEAD, self._shared.empty)), after=pages[-1])
            if more is None:
                return False
            self._set(sequence, pages + more)
        return True

    def trim(self, sequence: DecodeSequence, tokens: int) -> bool:
        pages, keep = self._pages[sequence.id], self.pages_for(tokens)
        surplus = pages[keep:]
        if surplus:
            self._shared.release(surplus)
            self._set(sequence, pages[:keep])
        return bool(surplus)

    @property
    def saved_page_bytes(self) -> int:
        rows = (*(keys[0] for keys in self._pool.keys), *(values[0] for values in self._pool.values))
        return self._pool.page_tokens * sum(row.nbytes for row in rows)

    saved_extra_pages = 0

    def save(self, sequence: DecodeSequence) -> SavedPages:
        runs, layers = self._runs[sequence.id], range(len(self._model.layers))
        read = (self._pool.read(layer, runs, 0, sequence.computed) for layer in layers)
        return SavedPages((0, 0), tuple(tuple(part.to("cpu", copy=True) for part in both) for both in read))

    def saved_bytes(self, sequence: DecodeSequence) -> int:
        return sequence.computed * self.saved_page_bytes // self._pool.page_tokens

    def restore(self, sequence: DecodeSequence, saved: SavedPages, tokens: int) -> bool:
        pages = self._shared.take(self.pages_for(tokens))
        if pages is None:
            return False
        self._set(sequence, pages)
        for layer, (keys, values) in enumerate(saved.layers):
            self._pool.write(layer, self._runs[sequence.id], 0, keys, values)
        self.publish(sequence, sequence.computed)
        return True

    def _set(self, sequence: DecodeSequence, pages: list[int]) -> None:
        self._pages[sequence.id], self._runs[sequence.id] = pages, runs_of(pages)

    def release(self, sequence: DecodeSequence) -> None:
        self._runs.pop(sequence.id, None)
        self._shared.release(self._pages.pop(sequence.id, []))

    def publish(self, sequence: DecodeSequence, stored: int) -> None:
        page_tokens = self._pool.page_tokens
        addresses = sequence.page_addresses(final_pages(stored, page_tokens, sequence.codec.packs), page_tokens)
        for page, address in zip(self._pages[sequence.id], addresses, strict=False):
            self._shared.publish(page, address)

    def seal(self, sequence: DecodeSequence) -> None:
        newest, page_tokens = sequence.computed // self._pool.page_tokens - 1, self._pool.page_tokens
        if sequence.codec.packs and newest > 0:
            self._pack(sequence, newest)
        for page, address in zip(
            self._pages[sequence.id], sequence.page_addresses(newest + 1, page_tokens), strict=False
        ):
            self._shared.publish(page, address)

    def read_held(self, sequence: DecodeSequence, layer: int) -> tuple[Tensor, Tensor]:
        return self._pool.read(layer, self._runs[sequence.id], 0, sequence.held)

    def receive(self, sequence: DecodeSequence, receiver: KvReceiver, section: ReceivedSection) -> None:
        header = section.header
        keys, values = receiver.decode(section, self._model.dtype)
        self._pool.write(header.layer, self._runs[sequence.id], header.start, keys, values)

    def put(self, sequence: DecodeSequence, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor) -> None:
        if section.packed:
            packed = sequence.codec.encode(layer, keys_THD, values_THD)
            keys_THD, values_THD = sequence.codec.decode(layer, packed, self._model.dtype)
        self._pool.write(layer, self._runs[sequence.id], section.start, keys_THD, values_THD)

    rounds_endings = True

    def begin_step(self, work: Sequence[Advance]) -> Attend:
        pool, windows = self._pool, [layer.window for layer in self._model.layers]
        spans, slots, rounded = [], [], []
        for advance in work:
            runs, start, end = self._runs[advance.sequence.id], advance.start, advance.end
            if self._rounds(advance):
                rounded.append((advance.sequence, slice(len(slots), len(slots) + end - start)))
            ranges = tuple(pool.slots(runs, 0, end))
            spans.append(Span(len(slots), end - start, start, ranges, output=not advance.in_prompt))
            slot, tokens = ranges[-1]
            if end - start <= tokens:
                slots += range(slot + tokens - (end - start), slot + tokens)
            else:
                slots += (at for slot, tokens in pool.slots(runs, start, end) for at in range(slot, slot + tokens))
        slots_B, spans_B = torch.tensor(slots, device=self._model.device), tuple(spans)

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            keys, values = pool.keys[layer], pool.values[layer]
            keys.index_copy_(0, slots_B, k_THD)
            values.index_copy_(0, slots_B, v_THD)
            out_THD = ragged_attention(q_THD, keys, values, spans_B, scale, windows[layer])
            for sequence, rows in rounded:
                self._round(sequence, layer, slots_B[rows], k_THD[rows], v_THD[rows])
            return out_THD

        return attend

    def _rounds(self, advance: Advance) -> bool:
        """Whether it is the whole ending of a prompt, as computed: no token after it looks at it as it is now."""
        packs = advance.sequence.codec.packs and self._model.dtype != torch.bfloat16
        return packs and advance.in_prompt and advance.sequence.local is None

    def _round(self, sequence: DecodeSequence, layer: int, slots_N: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> None:
        """Leaves in the pool what a transfer would leave."""
        try:
            check_finite(layer, k_NHD, v_NHD)
        except IsthmusError as error:
            self._failed.setdefault(sequence.id, (sequence, error))
        for rows, x_NHD in ((self._pool.keys[layer], k_NHD), (self._pool.values[layer], v_NHD)):
            rows.index_copy_(0, slots_N, x_NHD.to(torch.bfloat16).to(rows.dtype))

    def end_step(self, work: Sequence[Advance]) -> list[tuple[DecodeSequence, IsthmusError]]:
        failed, page_tokens = list(self._failed.values()), self._pool.page_tokens
        for advance in work:
            sequence = advance.sequence
            if sequence.id in self._failed:
                continue
            page = page_to_pack(advance.end, len(sequence.prompt), page_tokens, sequence.codec.packs)
            try:
                if page is not None:
                    self._pack(advance.sequence, page)
            except IsthmusError as error:
                failed.append((advance.sequence, error))
                continue
            except Exception as error:
                failed.append((advance.sequence, no_memory(error, "page")))
                continue
            if advance.completes_page(page_tokens):
                self.publish(advance.sequence, advance.end)
        self._failed = {}
        return failed

    def _pack(self, sequence: DecodeSequence, page: int) -> None:
        """Has a page's numbers go through the codec; those of the newest page of a prompt or an answer stay raw too."""
        runs, codec, page_tokens = self._runs[sequence.id], sequence.codec, self._pool.page_tokens
        addresses = sequence.page_addresses(page + 1, page_tokens)
        if addresses and page + 1 in (len(sequence.prompt) // page_tokens, sequence.computed // page_tokens):
            self._raw.keep(runs, page, addresses[page])
        start = page * page_tokens
        for layer in range(len(self._model.layers)):
            keys, values = self._pool.read(layer, runs, start, start + page_tokens)
            packed = codec.encode(layer, keys, values)
            self._pool.write(layer, runs, start, *codec.decode(layer, packed, self._model.dtype))
