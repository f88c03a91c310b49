"""The packed pool: pages stay packed in device memory, and attention reads them as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.paged_attention import PagedKV, paged_attention_reference
from ..kvtransfer.allocator import PageAllocator, Run
from ..kvtransfer.codec_checks import check_finite
from ..kvtransfer.codec_tq import TqCodec
from ..kvtransfer.frame import PACKED
from ..kvtransfer.page import Section, packed_range
from ..kvtransfer.receiver import KvReceiver, ReceivedSection
from ..model.model import Model
from ..proto.errors import InvalidRequest, IsthmusError
from ..proto.worker_pb2 import PageCounts
from .scheduler import SequenceId
from .sequence import Advance, DecodeSequence
from .store import Attend, page_to_pack

RAW_PAGES = 3  # of one request at most: the first, the newest full one, and the one that fills or was just filled


@dataclass
class _Table:
    """The pages of one request: where each lies, and what is still reserved for it."""

    packed_runs: tuple[Run, ...]
    raw_runs: tuple[Run, ...]
    spare_packed: list[int]
    spare_raw: list[int]
    slots: list[int] = field(default_factory=list)  # of each page, in the pool that its kind says
    packed: tuple[int, int] = (0, 0)  # pages [from, to) are packed, all others raw


class PackedStore:
    """Raw and packed pages of all layers under one page table for each request; one codec for all of them."""

    def __init__(self, model: Model, codec: TqCodec, pages: int, page_tokens: int, max_batch: int) -> None:
        self._model, self._codec, self._page_tokens = model, codec, page_tokens
        self._packed_pages = PageAllocator(pages)
        self._raw_pages = PageAllocator(RAW_PAGES * max_batch)
        self._tables: dict[SequenceId, _Table] = {}
        device = model.device
        raw = [(self._raw_pages.total, page_tokens, s.kv_heads, s.head_dim) for s in model.layers]
        self._raw_keys = [torch.zeros(shape, dtype=model.dtype, device=device) for shape in raw]
        self._raw_values = [torch.zeros(shape, dtype=model.dtype, device=device) for shape in raw]
        self._packed = [
            torch.zeros(pages, codec.page_bytes(layer), dtype=torch.uint8, device=device) for layer in range(len(raw))
        ]
        self._triton = uses_triton(device)

    @property
    def total_pages(self) -> int:
        return self._packed_pages.total

    @property
    def free_pages(self) -> int:
        return self._packed_pages.free

    def counts(self) -> PageCounts:
        pages = self._packed_pages
        return PageCounts(total=pages.total, free=pages.free, in_use=pages.in_use)

    def admit(self, sequence: DecodeSequence, pages: int) -> None:
        packed_runs, raw_runs = self._packed_pages.take(pages), self._raw_pages.take(RAW_PAGES)
        assert packed_runs is not None and raw_runs is not None, "the scheduler admitted a request that does not fit"
        table = _Table(packed_runs, raw_runs, _pages(packed_runs), _pages(raw_runs))
        prompt, page_tokens = len(sequence.prompt), self._page_tokens
        start, end = packed_range(prompt, page_tokens, packs=True)
        table.packed = (start // page_tokens, end // page_tokens)
        for page in range(-(-prompt // page_tokens)):
            packed = table.packed[0] <= page < table.packed[1]
            table.slots.append((table.spare_packed if packed else table.spare_raw).pop())
        self._tables[sequence.id] = table

    def release(self, sequence: DecodeSequence) -> None:
        table = self._tables.pop(sequence.id, None)
        if table:
            self._packed_pages.give_back(table.packed_runs)
            self._raw_pages.give_back(table.raw_runs)

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

    def begin_step(self, work: Sequence[Advance]) -> Attend:
        """Each token is a sequence of its own for the kernel, so that one call serves steps and chunks alike."""
        device, windows = self._model.device, [layer.window for layer in self._model.layers]
        tables, rows, lengths = [], [], []
        for advance in work:
            table = self._tables[advance.sequence.id]
            for position in range(advance.start, advance.end):
                page, offset = divmod(position, self._page_tokens)
                if page == len(table.slots):
                    table.slots.append(table.spare_raw.pop())
                rows.append(table.slots[page] * self._page_tokens + offset)
                tables.append(table)
                lengths.append(position + 1)
        rows_B = torch.tensor(rows, device=device)
        most = max(len(table.slots) for table in tables)
        table_BN = _int32([table.slots + [0] * (most - len(table.slots)) for table in tables], device)
        from_B, to_B = (_int32([table.packed[end] for table in tables], device) for end in (0, 1))
        lengths_B = _int32(lengths, device)

        def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
            raw_keys, raw_values = self._raw_keys[layer], self._raw_values[layer]
            raw_keys.flatten(0, 1).index_copy_(0, rows_B, k_THD)
            raw_values.flatten(0, 1).index_copy_(0, rows_B, v_THD)
            kv = PagedKV(
                raw_k_RPHD=raw_keys,
                raw_v_RPHD=raw_values,
                packed_SB=self._packed[layer],
                table_BN=table_BN,
                packed_from_B=from_B,
                packed_to_B=to_B,
                lengths_B=lengths_B,
                layout=self._codec.layout(layer),
            )
            return self._attention(q_THD, kv, layer, scale, windows[layer])

        return attend

    def _attention(self, q_THD: Tensor, kv: PagedKV, layer: int, scale: float, window: int | None) -> Tensor:
        rotations = self._codec.rotations(layer, self._model.device)
        q_BQHD = q_THD.unsqueeze(1).contiguous()
        if self._triton:
            from ..kernels.paged_attention_triton import paged_attention

            return paged_attention(q_BQHD, kv, rotations, scale, window)[0][:, 0]
        return paged_attention_reference(q_BQHD, kv, rotations, scale, window)[0][:, 0]

    def end_step(self, work: Sequence[Advance]) -> list[tuple[DecodeSequence, IsthmusError]]:
        due: list[tuple[_Table, int]] = []
        failed: list[tuple[DecodeSequence, IsthmusError]] = []
        for advance in work:
            page = page_to_pack(advance, self._page_tokens)
            if page is None:
                continue
            sequence, table = advance.sequence, self._tables[advance.sequence.id]
            try:
                self._check_finite(table.slots[page])
                due.append((table, page))
            except InvalidRequest as error:
                failed.append((sequence, error))
        if not due:
            return failed
        raw = torch.tensor([table.slots[page] for table, page in due], device=self._model.device)
        slots = [table.spare_packed.pop() for table, _ in due]
        packed = torch.tensor(slots, device=self._model.device)
        for layer in range(len(self._model.layers)):
            self._pack(layer, raw, packed)
        for (table, page), slot in zip(due, slots, strict=True):
            table.spare_raw.append(table.slots[page])
            table.slots[page] = slot
            table.packed = (1, page + 1)
        return failed

    def _check_finite(self, slot: int) -> None:
        for layer, (keys, values) in enumerate(zip(self._raw_keys, self._raw_values, strict=True)):
            check_finite(layer, keys[slot], values[slot])

    def _pack(self, layer: int, raw_P: Tensor, packed_P: Tensor) -> None:
        """Packs raw pages into packed slots, one launch for the layer."""
        keys, values = (pool[layer].flatten(0, 1) for pool in (self._raw_keys, self._raw_values))
        if self._triton:
            from ..kernels.pack_triton import pack

            gains = self._codec.gains(layer, self._model.device)
            layout, pool = self._codec.layout(layer), self._packed[layer]
            pack(keys, values, raw_P * self._page_tokens, *gains, layout, pool, packed_P)
            return
        rows = (raw_P[:, None] * self._page_tokens + torch.arange(self._page_tokens)).flatten()
        self._packed[layer][packed_P] = self._codec.encode(layer, keys[rows], values[rows])


def uses_triton(device: torch.device) -> bool:
    """Whether the kernels run; elsewhere their PyTorch references do."""
    return device.type == "cuda"


def _pages(runs: tuple[Run, ...]) -> list[int]:
    return [page for run in runs for page in range(run.first, run.end)]


def _int32(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
