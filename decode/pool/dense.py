"""The dense pool: one row for each token and layer, in the dtype of the computation."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...kernels.attention.dense import Span, ragged_attention
from ...kvtransfer.codecs.checks import check_finite
from ...kvtransfer.codecs.registry import PageCodec
from ...kvtransfer.page import Section
from ...kvtransfer.pool.allocator import Run
from ...kvtransfer.pool.dense import DensePool
from ...kvtransfer.pool.table import PageTable, runs_of
from ...kvtransfer.receiver import KvReceiver, ReceivedSection
from ...model.attention import Attend
from ...model.model import Model
from ...proto.errors import IsthmusError
from ...proto.worker_pb2 import PageCounts
from ...worker.engine import no_memory
from ...worker.step_plan import SequenceId, SequencePages, StepBatch
from .base import PooledSequence, SavedPages, completes_page, final_pages, page_to_pack
from .raw_copies import RawCopies

EXTEND_AHEAD = 4  # pages that a request takes beyond the next one while pages are empty, so that they lie together


class DenseKvPool:
    """See `KvPool`. A packed page is unpacked once, on arrival."""

    def __init__(
        self,
        model: Model,
        codecs: Callable[[str], PageCodec],
        pages: int,
        page_tokens: int,
        *,
        cached_pages: int,
    ) -> None:
        """`codecs`: those of its sequences, by name."""
        self._model, self._codecs, self.page_tokens = model, codecs, page_tokens
        self._pool = DensePool(model.layers, pages, page_tokens, dtype=model.dtype, device=model.device)
        self._shared = PageTable(self._pool.allocator, cached_pages)
        self._raw_copies = RawCopies(self._pool, self._shared)
        self._failed: dict[SequenceId, IsthmusError] = {}  # in the step that runs
        self._pages: dict[SequenceId, SequencePages] = {}

    @property
    def total_pages(self) -> int:
        return self._pool.allocator.total

    @property
    def in_use(self) -> int:
        return self._shared.in_use

    @property
    def free_pages(self) -> int:
        return self._shared.free

    def pages_for(self, tokens: int) -> int:
        return self._pool.pages_for(tokens)

    def pages_of(self, sequence: PooledSequence) -> int:
        pages = self._pages.get(sequence.id)
        return len(pages.slots) if pages else 0

    @property
    def used_bytes(self) -> tuple[int, int]:
        return (self._shared.in_use + self._shared.cached) * self.saved_page_bytes, 0

    def counts(self) -> PageCounts:
        shared = self._shared
        return PageCounts(total=self.total_pages, free=shared.empty, cached=shared.cached, in_use=shared.in_use)

    def allocate(self, sequence: PooledSequence, tokens: int, preferred_tokens: int) -> bool:
        page_tokens = self.page_tokens
        found = self._shared.share_first(sequence.reusable_addresses(page_tokens))
        missing, preferred = (self.pages_for(some) - len(found) for some in (tokens, preferred_tokens))
        after = found[-1] if found else None
        copy = self._raw_copies.share(sequence.raw_copy_address(page_tokens, len(found)))
        rest = self._shared.take(max(missing, min(preferred, self._shared.empty)), after)
        if rest is None and copy is not None:  # the copy may be the very page that is missing
            self._raw_copies.release(copy)
            copy, rest = None, self._shared.take(missing, after)
        if rest is not None:
            sequence.cached_tokens = (len(found) + (copy is not None)) * page_tokens
            self._set(sequence, found + rest)
            if copy is not None:
                self._raw_copies.restore(copy, self._runs(sequence), len(found))
        else:
            self._shared.release(found)
        if copy is not None:
            self._raw_copies.release(copy)
        return rest is not None

    def extend(self, sequence: PooledSequence, tokens: int) -> bool:
        slots = self._pages[sequence.id].slots
        missing = self.pages_for(tokens) - len(slots)
        if missing > 0:
            more = self._shared.take(max(missing, min(missing + EXTEND_AHEAD, self._shared.empty)), after=slots[-1])
            if more is None:
                return False
            self._set(sequence, [*slots, *more])
        return True

    def trim(self, sequence: PooledSequence, tokens: int) -> bool:
        slots, keep = self._pages[sequence.id].slots, self.pages_for(tokens)
        surplus = slots[keep:]
        if surplus:
            self._shared.release(surplus)
            self._set(sequence, slots[:keep])
        return bool(surplus)

    def free(self, sequence: PooledSequence) -> None:
        pages = self._pages.pop(sequence.id, None)
        if pages:
            self._shared.release(pages.slots)

    @property
    def saved_page_bytes(self) -> int:
        rows = (*(keys[0] for keys in self._pool.keys), *(values[0] for values in self._pool.values))
        return self.page_tokens * sum(row.nbytes for row in rows)

    saved_extra_pages = 0

    def save(self, sequence: PooledSequence) -> SavedPages:
        runs, layers = self._runs(sequence), range(len(self._model.layers))
        read = (self._pool.read(layer, runs, 0, sequence.computed) for layer in layers)
        return SavedPages((0, 0), tuple(tuple(part.to("cpu", copy=True) for part in both) for both in read))

    def saved_bytes(self, sequence: PooledSequence) -> int:
        return sequence.computed * self.saved_page_bytes // self.page_tokens

    def restore(self, sequence: PooledSequence, saved: SavedPages, tokens: int) -> bool:
        pages = self._shared.take(self.pages_for(tokens))
        if pages is None:
            return False
        self._set(sequence, pages)
        for layer, (keys, values) in enumerate(saved.layers):
            self._pool.write(layer, self._runs(sequence), 0, keys, values)
        self.publish(sequence, sequence.computed)
        return True

    def _set(self, sequence: PooledSequence, slots: Sequence[int]) -> None:
        self._pages[sequence.id] = SequencePages(tuple(slots), sequence.codec.name)

    def _runs(self, sequence: PooledSequence) -> tuple[Run, ...]:
        return _runs_of(self._pages[sequence.id].slots)

    def publish(self, sequence: PooledSequence, stored: int) -> None:
        page_tokens = self.page_tokens
        addresses = sequence.page_addresses(final_pages(stored, page_tokens, sequence.codec.packs), page_tokens)
        for page, address in zip(self._pages[sequence.id].slots, addresses, strict=False):
            self._shared.publish(page, address)

    def finalize(self, sequence: PooledSequence) -> None:
        newest, page_tokens = sequence.computed // self.page_tokens - 1, self.page_tokens
        if sequence.codec.packs and newest > 0:
            self._pack(sequence, newest)
        addresses = sequence.page_addresses(newest + 1, page_tokens)
        for page, address in zip(self._pages[sequence.id].slots, addresses, strict=False):
            self._shared.publish(page, address)

    def receive(self, sequence: PooledSequence, receiver: KvReceiver, section: ReceivedSection) -> None:
        header = section.header
        keys, values = receiver.decode(section, self._model.dtype)
        self._pool.write(header.layer, self._runs(sequence), header.start, keys, values)

    def step_pages(self, sequence: PooledSequence, end: int) -> SequencePages:
        return self._pages[sequence.id]

    def codec(self, pages: SequencePages) -> PageCodec:
        return self._codecs(pages.codec)

    def read_prefix(self, pages: SequencePages, tokens: int, layer: int) -> tuple[Tensor, Tensor]:
        return self._pool.read(layer, _runs_of(pages.slots), 0, tokens)

    def read_raw(self, pages: SequencePages, start: int, end: int, layer: int) -> tuple[Tensor, Tensor]:
        return self._pool.read(layer, _runs_of(pages.slots), start, end)

    def write_section(
        self, pages: SequencePages, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor
    ) -> None:
        if section.packed:
            codec = self.codec(pages)
            keys_THD, values_THD = codec.decode(layer, codec.encode(layer, keys_THD, values_THD), self._model.dtype)
        self._pool.write(layer, _runs_of(pages.slots), section.start, keys_THD, values_THD)

    rounds_endings = True

    def attend_step(self, batch: StepBatch) -> Attend:
        pool, windows = self._pool, [layer.window for layer in self._model.layers]
        spans, rows, rounded = list[Span](), list[int](), list[tuple[SequenceId, slice]]()
        for plan, pages in zip(batch.sequences, batch.pages, strict=True):
            new = plan.end - plan.start
            if plan.in_prompt and self._rounds(pages):
                rounded.append((plan.sequence, slice(len(rows), len(rows) + new)))
            runs = _runs_of(pages.slots)
            places = tuple(pool.slots(runs, 0, plan.end))
            spans.append(Span(len(rows), new, plan.start, places, output=not plan.in_prompt))
            first, tokens = places[-1]
            if new <= tokens:
                rows += range(first + tokens - new, first + tokens)
            else:
                rows += (
                    row
                    for first, tokens in pool.slots(runs, plan.start, plan.end)
                    for row in range(first, first + tokens)
                )
        rows_B, spans_B = torch.tensor(rows, device=self._model.device), tuple(spans)

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            keys, values = pool.keys[layer], pool.values[layer]
            keys.index_copy_(0, rows_B, k_THD)
            values.index_copy_(0, rows_B, v_THD)
            out_THD = ragged_attention(q_THD, keys, values, spans_B, scale, windows[layer])
            for sequence, of in rounded:
                self._round(sequence, layer, rows_B[of], k_THD[of], v_THD[of])
            return out_THD

        return attend

    def _rounds(self, pages: SequencePages) -> bool:
        """Whether a prompt that is computed in the pool is rounded: it is a whole ending, which no later token of the
        prompt looks at."""
        return self._model.dtype != torch.bfloat16 and self.codec(pages).packs

    def _round(self, sequence: SequenceId, layer: int, rows_N: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> None:
        """Leaves in the pool what a transfer would leave."""
        try:
            check_finite(layer, k_NHD, v_NHD)
        except IsthmusError as error:
            self._failed.setdefault(sequence, error)
        for pool, x_NHD in ((self._pool.keys[layer], k_NHD), (self._pool.values[layer], v_NHD)):
            pool.index_copy_(0, rows_N, x_NHD.to(torch.bfloat16).to(pool.dtype))

    def finish_step(self, stored: Sequence[tuple[PooledSequence, int]]) -> list[tuple[PooledSequence, IsthmusError]]:
        failed, page_tokens = list[tuple[PooledSequence, IsthmusError]](), self.page_tokens
        for sequence, end in stored:
            if sequence.id in self._failed:
                failed.append((sequence, self._failed[sequence.id]))
                continue
            page = page_to_pack(end, sequence.prompt_tokens, page_tokens, sequence.codec.packs)
            try:
                if page is not None:
                    self._pack(sequence, page)
            except IsthmusError as error:
                failed.append((sequence, error))
                continue
            except Exception as error:
                failed.append((sequence, no_memory(error, "page")))
                continue
            if completes_page(end, sequence.prompt_tokens, page_tokens):
                self.publish(sequence, end)
        self._failed = {}
        return failed

    def _pack(self, sequence: PooledSequence, page: int) -> None:
        """Has a page's numbers go through the codec; those of the newest page of a prompt or an answer stay raw too."""
        runs, codec, page_tokens = self._runs(sequence), sequence.codec, self.page_tokens
        addresses = sequence.page_addresses(page + 1, page_tokens)
        if addresses and page + 1 in (sequence.prompt_tokens // page_tokens, sequence.computed // page_tokens):
            self._raw_copies.keep(runs, page, addresses[page])
        start = page * page_tokens
        for layer in range(len(self._model.layers)):
            keys, values = self._pool.read(layer, runs, start, start + page_tokens)
            packed = codec.encode(layer, keys, values)
            self._pool.write(layer, runs, start, *codec.decode(layer, packed, self._model.dtype))


@lru_cache(maxsize=4096)
def _runs_of(slots: tuple[int, ...]) -> tuple[Run, ...]:
    """The pages of a sequence as runs; each step asks again for those of every sequence."""
    return runs_of(slots)
