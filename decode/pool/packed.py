"""The packed pool: pages stay packed in device memory, and attention reads them as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.attention.paged import PagedKV, paged_attention_reference
from ...kernels.attention.triton_path import has_triton
from ...kvtransfer.codecs.checks import check_finite
from ...kvtransfer.codecs.tq import TqCodec
from ...kvtransfer.frame import PACKED
from ...kvtransfer.page import Section, packed_range
from ...kvtransfer.pool.allocator import PageAllocator
from ...kvtransfer.pool.table import PageTable
from ...kvtransfer.receiver import KvReceiver, ReceivedSection
from ...model.model import Model
from ...proto.errors import InvalidRequest, IsthmusError
from ...proto.worker_pb2 import PageCounts
from ..sequences.pages import final_pages, page_to_pack
from ..sequences.scheduler import SequenceId
from ..sequences.sequence import Advance, DecodeSequence
from .base import Attend
from .page_places import PagePlaces, TokenPlace
from .raw_slots import RAW_PAGES, raw_slots
from .saved import SavedPages


@dataclass
class _Table:
    """The pages of one request: where each lies, and what is still reserved for it."""

    pages: int  # that it may fill; a packed slot is reserved for each that is not packed yet, and was not found here
    spare_packed: list[int]
    spare_raw: list[int]
    slots: list[int] = field(default_factory=list)  # of each page, in the pool that its kind says
    packed: tuple[int, int] = (0, 0)  # pages [from, to) are packed, all others raw

    def filled(self) -> tuple[list[int], list[int]]:
        """The slots of its pages: those in the raw and those in the packed pool, in order."""
        start, end = self.packed
        return self.slots[:start] + self.slots[end:], self.slots[start:end]


class PackedStore:
    """See `KvStore`: raw and packed pages of all layers under one page table for each request; one codec for all."""

    def __init__(
        self, model: Model, codec: TqCodec, pages: int, page_tokens: int, max_batch: int, *, cached_pages: int
    ) -> None:
        self._model, self._codec, self._page_tokens = model, codec, page_tokens
        self._packed_pages = PageTable(PageAllocator(pages), cached_pages)
        slots = raw_slots(max_batch, cached=bool(cached_pages))
        self._raw_pages = PageTable(PageAllocator(slots), max_batch if cached_pages else 0)
        self._total, self._scratch = pages, slots  # a raw page that is never given out
        self._tables: dict[SequenceId, _Table] = {}
        device = model.device
        raw = [(self._scratch + 1, page_tokens, s.kv_heads, s.head_dim) for s in model.layers]
        self._raw_keys = [torch.zeros(shape, dtype=model.dtype, device=device) for shape in raw]
        self._raw_values = [torch.zeros(shape, dtype=model.dtype, device=device) for shape in raw]
        self._packed = [
            torch.zeros(pages, codec.page_bytes(layer), dtype=torch.uint8, device=device) for layer in range(len(raw))
        ]
        self._triton = uses_triton(device)

    @property
    def total_pages(self) -> int:
        return self._total

    @property
    def in_use(self) -> int:
        return max(self._packed_pages.in_use, self._raw_pages.in_use)

    @property
    def free(self) -> int:
        return self._packed_pages.free

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    def pages_of(self, sequence: DecodeSequence) -> int:
        return self._tables[sequence.id].pages

    @property
    def used_bytes(self) -> tuple[int, int]:
        packed, raw = (pages.in_use + pages.cached for pages in (self._packed_pages, self._raw_pages))
        return packed * self.saved_page_bytes, raw * self._raw_page_bytes

    def counts(self) -> PageCounts:
        pages = self._packed_pages
        return PageCounts(total=self._total, free=pages.empty, cached=pages.cached, in_use=pages.in_use)

    def admit(self, sequence: DecodeSequence, tokens: int, wished_tokens: int) -> bool:
        """Every page that it does not find here gets a packed slot, since any but the first may come to be packed."""
        addresses = sequence.holdable_addresses(self._page_tokens)
        held = self._raw_pages.share_first(addresses[:1])
        held_packed = self._packed_pages.share_first(addresses[1:]) if held else []
        found = len(held) + len(held_packed)
        pages = max(self.pages_for(tokens), min(self.pages_for(wished_tokens), self._packed_pages.empty + found))
        packed, raw = self._packed_pages.take(pages - found), self._raw_pages.take(RAW_PAGES - len(held))
        if packed is None or raw is None:
            for pool, slots in (
                (self._packed_pages, held_packed + (packed or [])),
                (self._raw_pages, held + (raw or [])),
            ):
                pool.release(slots)
            return False
        sequence.held = found * self._page_tokens
        table = _Table(pages, packed, raw, held + held_packed)
        start, end = packed_range(len(sequence.prompt), self._page_tokens, packs=True)
        table.packed = (start // self._page_tokens, end // self._page_tokens)
        for page in range(len(table.slots), -(-len(sequence.prompt) // self._page_tokens)):
            is_packed = table.packed[0] <= page < table.packed[1]
            table.slots.append((table.spare_packed if is_packed else table.spare_raw).pop())
        self._tables[sequence.id] = table
        return True

    def grow(self, sequence: DecodeSequence, tokens: int) -> bool:
        table = self._tables[sequence.id]
        missing = self.pages_for(tokens) - table.pages
        more = self._packed_pages.take(missing) if missing > 0 else []
        if more is None:
            return False
        table.spare_packed += more
        table.pages += len(more)
        return True

    def trim(self, sequence: DecodeSequence, tokens: int) -> bool:
        table = self._tables[sequence.id]
        surplus = [table.spare_packed.pop() for _ in range(table.pages - self.pages_for(tokens))]
        table.pages -= len(surplus)
        self._packed_pages.release(surplus)
        return bool(surplus)

    @property
    def saved_page_bytes(self) -> int:
        return sum(pool[0].nbytes for pool in self._packed)

    @property
    def saved_extra_pages(self) -> int:
        return -(-RAW_PAGES * self._raw_page_bytes // self.saved_page_bytes)

    @property
    def _raw_page_bytes(self) -> int:
        return sum(pool[0].nbytes for pool in (*self._raw_keys, *self._raw_values))

    def save(self, sequence: DecodeSequence) -> SavedPages:
        table = self._tables[sequence.id]
        raw, packed = (torch.tensor(slots, device=self._model.device, dtype=torch.long) for slots in table.filled())
        pools = zip(self._raw_keys, self._raw_values, self._packed, strict=True)
        layers = ((keys[raw].cpu(), values[raw].cpu(), pages[packed].cpu()) for keys, values, pages in pools)
        return SavedPages(table.packed, tuple(layers))

    def saved_bytes(self, sequence: DecodeSequence) -> int:
        raw, packed = self._tables[sequence.id].filled()
        return len(raw) * self._raw_page_bytes + len(packed) * self.saved_page_bytes

    def restore(self, sequence: DecodeSequence, saved: SavedPages, tokens: int) -> bool:
        pages = self.pages_for(tokens)
        packed, raw = self._packed_pages.take(pages), self._raw_pages.take(RAW_PAGES)
        if packed is None or raw is None:
            self._packed_pages.release(packed or [])
            self._raw_pages.release(raw or [])
            return False
        table = _Table(pages, packed, raw, packed=saved.packed)
        for page in range(self.pages_for(sequence.computed)):
            is_packed = saved.packed[0] <= page < saved.packed[1]
            table.slots.append((table.spare_packed if is_packed else table.spare_raw).pop())
        self._tables[sequence.id] = table
        at = [torch.tensor(slots, device=self._model.device, dtype=torch.long) for slots in table.filled()]
        for layer, (keys, values, packed_pages) in enumerate(saved.layers):
            self._raw_keys[layer][at[0]] = keys.to(self._model.device)
            self._raw_values[layer][at[0]] = values.to(self._model.device)
            self._packed[layer][at[1]] = packed_pages.to(self._model.device)
        self.publish(sequence, sequence.computed)
        return True

    def release(self, sequence: DecodeSequence) -> None:
        table = self._tables.pop(sequence.id, None)
        if table:
            raw, packed = table.filled()
            self._raw_pages.release(raw + table.spare_raw)
            self._packed_pages.release(packed + table.spare_packed)

    def publish(self, sequence: DecodeSequence, stored: int) -> None:
        self._publish(sequence, final_pages(stored, self._page_tokens, packs=True))

    def _publish(self, sequence: DecodeSequence, pages: int) -> None:
        slots = self._tables[sequence.id].slots
        for page, address in enumerate(sequence.page_addresses(pages, self._page_tokens)):
            (self._packed_pages if page else self._raw_pages).publish(slots[page], address)

    def seal(self, sequence: DecodeSequence) -> None:
        newest = sequence.computed // self._page_tokens - 1
        if newest > 0:
            self._pack_all([(self._tables[sequence.id], newest)])
        self._publish(sequence, newest + 1)

    def read_held(self, sequence: DecodeSequence, layer: int) -> tuple[Tensor, Tensor]:
        first, *packed = self._tables[sequence.id].slots[: sequence.held // self._page_tokens]
        raw = self._raw_keys[layer][first], self._raw_values[layer][first]
        if not packed:
            return raw
        pages = self._packed[layer][torch.tensor(packed, device=self._model.device)]
        rest = self._codec.decode(layer, pages, self._model.dtype)
        keys, values = (torch.cat(parts) for parts in zip(raw, rest, strict=True))
        return keys, values

    def receive(self, sequence: DecodeSequence, receiver: KvReceiver, section: ReceivedSection) -> None:
        header = section.header
        slots = self._slots(sequence, header.start, header.tokens)
        if header.encoding == PACKED:
            pages = torch.frombuffer(bytearray(section.data), dtype=torch.uint8).view(len(slots), -1)
            self._put_packed(header.layer, slots, pages)
        else:
            self._put_raw(header.layer, slots, *receiver.decode(section, self._model.dtype))

    def put(self, sequence: DecodeSequence, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor) -> None:
        slots = self._slots(sequence, section.start, section.tokens)
        if section.packed:
            self._put_packed(layer, slots, self._codec.encode(layer, keys_THD, values_THD))
        else:
            self._put_raw(layer, slots, keys_THD, values_THD)

    def _slots(self, sequence: DecodeSequence, start: int, tokens: int) -> list[int]:
        """Of the pages that hold the tokens [start, start + tokens); `start` is the first of a page."""
        first = start // self._page_tokens
        return self._tables[sequence.id].slots[first : first + -(-tokens // self._page_tokens)]

    def _put_packed(self, layer: int, slots: list[int], pages_PB: Tensor) -> None:
        device = self._model.device
        self._packed[layer][torch.tensor(slots, device=device)] = pages_PB.to(device)

    def _put_raw(self, layer: int, slots: list[int], keys_THD: Tensor, values_THD: Tensor) -> None:
        for index, slot in enumerate(slots):
            rows = slice(index * self._page_tokens, (index + 1) * self._page_tokens)
            for pool, new in ((self._raw_keys, keys_THD[rows]), (self._raw_values, values_THD[rows])):
                pool[layer][slot, : len(new)] = new.to(self._model.device)

    rounds_endings = False  # raw pages are bf16

    def begin_step(self, work: Sequence[Advance]) -> Attend:
        return self.attend(PagePlaces.of(self.place(work), self._model.device))

    @property
    def scratch(self) -> TokenPlace:
        """The place of a token that belongs to no request."""
        return TokenPlace(self._scratch * self._page_tokens, 0, 0, 1, [self._scratch])

    def place(self, work: Sequence[Advance]) -> list[TokenPlace]:
        """Where each token of a step goes; takes a page for one that begins it."""
        places = []
        for advance in work:
            table = self._tables[advance.sequence.id]
            for position in range(advance.start, advance.end):
                page, offset = divmod(position, self._page_tokens)
                if page == len(table.slots):
                    table.slots.append(table.spare_raw.pop())
                row = table.slots[page] * self._page_tokens + offset
                places.append(TokenPlace(row, *table.packed, position + 1, table.slots[: page + 1]))
        return places

    def attend(self, places: PagePlaces) -> Attend:
        """The attention callback for tokens at these places. It reads them on the device alone, at each call anew."""
        windows = [layer.window for layer in self._model.layers]
        rows_B = places.rows_B.long()

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            raw_keys, raw_values = self._raw_keys[layer], self._raw_values[layer]
            raw_keys.flatten(0, 1).index_copy_(0, rows_B, k_THD)
            raw_values.flatten(0, 1).index_copy_(0, rows_B, v_THD)
            kv = PagedKV(
                raw_k_RPHD=raw_keys,
                raw_v_RPHD=raw_values,
                packed_SB=self._packed[layer],
                table_BN=places.table_BN,
                packed_from_B=places.packed_from_B,
                packed_to_B=places.packed_to_B,
                lengths_B=places.lengths_B,
                layout=self._codec.layout(layer),
            )
            return self._attention(q_THD, kv, layer, scale, windows[layer])

        return attend

    def _attention(self, q_THD: Tensor, kv: PagedKV, layer: int, scale: float, window: int | None) -> Tensor:
        rotations = self._codec.rotations(layer, self._model.device)
        q_BQHD = q_THD.unsqueeze(1).contiguous()
        if self._triton:
            from ...kernels.attention.paged_triton import paged_attention

            return paged_attention(q_BQHD, kv, rotations, scale, window)[0][:, 0]
        return paged_attention_reference(q_BQHD, kv, rotations, scale, window)[0][:, 0]

    def end_step(self, work: Sequence[Advance]) -> list[tuple[DecodeSequence, IsthmusError]]:
        due: list[tuple[_Table, int]] = []
        failed: list[tuple[DecodeSequence, IsthmusError]] = []
        for advance in work:
            sequence = advance.sequence
            page = page_to_pack(advance.end, len(sequence.prompt), self._page_tokens, packs=True)
            if page is None:
                continue
            table = self._tables[sequence.id]
            try:
                self._check_finite(table.slots[page])
                due.append((table, page))
            except InvalidRequest as error:
                failed.append((sequence, error))
        self._pack_all(due)
        spoilt = [sequence for sequence, _ in failed]
        for advance in work:
            if advance.completes_page(self._page_tokens) and advance.sequence not in spoilt:
                self.publish(advance.sequence, advance.end)
        return failed

    def _pack_all(self, due: list[tuple[_Table, int]]) -> None:
        """Packs raw pages, which are the first after those that are packed already."""
        if not due:
            return
        raw = torch.tensor([table.slots[page] for table, page in due], device=self._model.device)
        slots = [table.spare_packed.pop() for table, _ in due]
        packed = torch.tensor(slots, device=self._model.device)
        for layer in range(len(self._model.layers)):
            self._pack(layer, raw, packed)
        for (table, page), slot in zip(due, slots, strict=True):
            table.spare_raw.append(table.slots[page])
            table.slots[page] = slot
            table.packed = (1, page + 1)

    def _check_finite(self, slot: int) -> None:
        for layer, (keys, values) in enumerate(zip(self._raw_keys, self._raw_values, strict=True)):
            check_finite(layer, keys[slot], values[slot])

    def _pack(self, layer: int, raw_P: Tensor, packed_P: Tensor) -> None:
        """Packs raw pages into packed slots, one launch for the layer."""
        keys, values = (pool[layer].flatten(0, 1) for pool in (self._raw_keys, self._raw_values))
        if self._triton:
            from ...kernels.pages.pack_triton import pack

            rotations = self._codec.rotations(layer, self._model.device)
            layout, pool = self._codec.layout(layer), self._packed[layer]
            pack(keys, values, raw_P * self._page_tokens, rotations, layout, pool, packed_P)
            return
        tokens = torch.arange(self._page_tokens, device=raw_P.device)
        rows = (raw_P[:, None] * self._page_tokens + tokens).flatten()
        self._packed[layer][packed_P] = self._codec.encode(layer, keys[rows], values[rows])


def uses_triton(device: torch.device) -> bool:
    """Whether the kernels run; elsewhere their PyTorch references do."""
    return device.type == "cuda" and has_triton(device)
