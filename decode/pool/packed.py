"""The packed pool: pages stay packed in device memory, and attention reads them as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.attention.paged import PagedKV, paged_attention_reference
from ...kernels.attention.triton_path import has_triton
from ...kvtransfer.codecs.checks import check_finite
from ...kvtransfer.codecs.registry import PageCodec
from ...kvtransfer.codecs.tq import TqCodec
from ...kvtransfer.frame import PACKED
from ...kvtransfer.page import Section
from ...kvtransfer.receiver import KvReceiver, ReceivedSection
from ...model.attention import Attend
from ...model.model import Model
from ...proto.errors import InvalidRequest, IsthmusError
from ...worker.step_plan import SequencePages, StepBatch
from .base import PooledSequence, SavedPages, completes_page, page_to_pack
from .packed_pages import RAW_PAGES, PackedPages, SequenceTable
from .page_places import PagePlaces, TokenPlace


class PackedKvPool(PackedPages):
    """See `KvPool`: raw and packed pages of all layers under one page table for each request; one codec for all."""

    def __init__(
        self, model: Model, codec: TqCodec, pages: int, page_tokens: int, max_batch: int, *, cached_pages: int
    ) -> None:
        super().__init__(codec.name, pages, page_tokens, max_batch, cached_pages=cached_pages)
        self._model, self._codec = model, codec
        self._scratch = self.raw_slots  # a raw page that is never given out
        device = model.device
        raw = [(self._scratch + 1, page_tokens, s.kv_heads, s.head_dim) for s in model.layers]
        self._raw_keys = [torch.zeros(shape, dtype=model.dtype, device=device) for shape in raw]
        self._raw_values = [torch.zeros(shape, dtype=model.dtype, device=device) for shape in raw]
        self._packed = [
            torch.zeros(pages, codec.page_bytes(layer), dtype=torch.uint8, device=device) for layer in range(len(raw))
        ]
        self._triton = uses_triton(device)

    @property
    def used_bytes(self) -> tuple[int, int]:
        packed, raw = (pages.in_use + pages.cached for pages in (self._packed_pages, self._raw_pages))
        return packed * self.saved_page_bytes, raw * self._raw_page_bytes

    @property
    def saved_page_bytes(self) -> int:
        return sum(pool[0].nbytes for pool in self._packed)

    @property
    def saved_extra_pages(self) -> int:
        return -(-RAW_PAGES * self._raw_page_bytes // self.saved_page_bytes)

    @property
    def _raw_page_bytes(self) -> int:
        return sum(pool[0].nbytes for pool in (*self._raw_keys, *self._raw_values))

    def save(self, sequence: PooledSequence) -> SavedPages:
        table = self._tables[sequence.id]
        raw, packed = (torch.tensor(slots, device=self._model.device, dtype=torch.long) for slots in table.filled())
        pools = zip(self._raw_keys, self._raw_values, self._packed, strict=True)
        layers = ((keys[raw].cpu(), values[raw].cpu(), pages[packed].cpu()) for keys, values, pages in pools)
        return SavedPages(table.packed, tuple(layers))

    def saved_bytes(self, sequence: PooledSequence) -> int:
        raw, packed = self._tables[sequence.id].filled()
        return len(raw) * self._raw_page_bytes + len(packed) * self.saved_page_bytes

    def restore(self, sequence: PooledSequence, saved: SavedPages, tokens: int) -> bool:
        table = self.allocate_saved(sequence, tokens, saved.packed)
        if table is None:
            return False
        at = [torch.tensor(slots, device=self._model.device, dtype=torch.long) for slots in table.filled()]
        for layer, (keys, values, packed_pages) in enumerate(saved.layers):
            self._raw_keys[layer][at[0]] = keys.to(self._model.device)
            self._raw_values[layer][at[0]] = values.to(self._model.device)
            self._packed[layer][at[1]] = packed_pages.to(self._model.device)
        self.publish(sequence, sequence.computed)
        return True

    def finalize(self, sequence: PooledSequence) -> None:
        newest = sequence.computed // self.page_tokens - 1
        if newest > 0:
            self._pack_all([(self._tables[sequence.id], newest)])
        self._publish_pages(sequence, newest + 1)

    def receive(self, sequence: PooledSequence, receiver: KvReceiver, section: ReceivedSection) -> None:
        header = section.header
        slots = self._slots(self._tables[sequence.id].slots, header.start, header.tokens)
        if header.encoding == PACKED:
            pages = torch.frombuffer(bytearray(section.data), dtype=torch.uint8).view(len(slots), -1)
            self._write_packed(header.layer, slots, pages)
        else:
            self._write_raw(header.layer, slots, *receiver.decode(section, self._model.dtype))

    def codec(self, pages: SequencePages) -> PageCodec:
        return self._codec

    def read_prefix(self, pages: SequencePages, tokens: int, layer: int) -> tuple[Tensor, Tensor]:
        first, *packed = pages.slots[: tokens // self.page_tokens]
        raw = self._raw_keys[layer][first], self._raw_values[layer][first]
        if not packed:
            return raw
        rest = self._codec.decode(
            layer, self._packed[layer][torch.tensor(packed, device=self._model.device)], self._model.dtype
        )
        keys, values = (torch.cat(parts) for parts in zip(raw, rest, strict=True))
        return keys, values

    def read_raw(self, pages: SequencePages, start: int, end: int, layer: int) -> tuple[Tensor, Tensor]:
        slots = torch.tensor(self._slots(pages.slots, start, end - start), device=self._model.device, dtype=torch.long)
        keys, values = (pool[layer][slots].flatten(0, 1) for pool in (self._raw_keys, self._raw_values))
        return keys[: end - start], values[: end - start]

    def write_section(
        self, pages: SequencePages, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor
    ) -> None:
        slots = self._slots(pages.slots, section.start, section.tokens)
        if section.packed:
            self._write_packed(layer, slots, self._codec.encode(layer, keys_THD, values_THD))
        else:
            self._write_raw(layer, slots, keys_THD, values_THD)

    def _slots(self, slots: Sequence[int], start: int, tokens: int) -> Sequence[int]:
        """Of the pages that hold the tokens [start, start + tokens); `start` is the first of a page."""
        first = start // self.page_tokens
        return slots[first : first + -(-tokens // self.page_tokens)]

    def _write_packed(self, layer: int, slots: Sequence[int], pages_PB: Tensor) -> None:
        device = self._model.device
        self._packed[layer][torch.tensor(slots, device=device)] = pages_PB.to(device)

    def _write_raw(self, layer: int, slots: Sequence[int], keys_THD: Tensor, values_THD: Tensor) -> None:
        for index, slot in enumerate(slots):
            rows = slice(index * self.page_tokens, (index + 1) * self.page_tokens)
            for pool, new in ((self._raw_keys, keys_THD[rows]), (self._raw_values, values_THD[rows])):
                pool[layer][slot, : len(new)] = new.to(self._model.device)

    rounds_endings = False  # raw pages are bf16

    def attend_step(self, batch: StepBatch) -> Attend:
        return self.attend(PagePlaces.of(self.places(batch), self._model.device))

    @property
    def scratch(self) -> TokenPlace:
        """The place of a token that belongs to no request."""
        return TokenPlace(self._scratch * self.page_tokens, 0, 0, 1, [self._scratch])

    def places(self, batch: StepBatch) -> list[TokenPlace]:
        """Where each token of a step goes, and what it sees."""
        places, page_tokens = [], self.page_tokens
        for plan, pages in zip(batch.sequences, batch.pages, strict=True):
            for position in range(plan.start, plan.end):
                page, offset = divmod(position, page_tokens)
                row = pages.slots[page] * page_tokens + offset
                places.append(TokenPlace(row, *pages.packed, position + 1, pages.slots[: page + 1]))
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

    def finish_step(self, stored: Sequence[tuple[PooledSequence, int]]) -> list[tuple[PooledSequence, IsthmusError]]:
        due: list[tuple[SequenceTable, int]] = []
        failed: list[tuple[PooledSequence, IsthmusError]] = []
        for sequence, end in stored:
            page = page_to_pack(end, sequence.prompt_tokens, self.page_tokens, packs=True)
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
        for sequence, end in stored:
            if completes_page(end, sequence.prompt_tokens, self.page_tokens) and sequence not in spoilt:
                self.publish(sequence, end)
        return failed

    def _pack_all(self, due: list[tuple[SequenceTable, int]]) -> None:
        """Packs raw pages, which are the first after those that are packed already."""
        if not due:
            return
        raw = torch.tensor([table.slots[page] for table, page in due], device=self._model.device)
        slots = [table.spare_packed.pop() for table, _ in due]
        packed = torch.tensor(slots, device=self._model.device)
        for layer in range(len(self._model.layers)):
            self._pack(layer, raw, packed)
        for (table, page), slot in zip(due, slots, strict=True):
            table.pack_page(page, slot)

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
            pack(keys, values, raw_P * self.page_tokens, rotations, layout, pool, packed_P)
            return
        tokens = torch.arange(self.page_tokens, device=raw_P.device)
        rows = (raw_P[:, None] * self.page_tokens + tokens).flatten()
        self._packed[layer][packed_P] = self._codec.encode(layer, keys[rows], values[rows])


def uses_triton(device: torch.device) -> bool:
    """Whether the kernels run; elsewhere their PyTorch references do."""
    return device.type == "cuda" and has_triton(device)
