"""Which raw and packed pages the requests of the packed pool have. Pure bookkeeping: no tensors."""

from dataclasses import dataclass, field

from ...kvtransfer.page import packed_range
from ...kvtransfer.pool.allocator import PageAllocator
from ...kvtransfer.pool.table import PageTable
from ...proto.worker_pb2 import PageCounts
from ...worker.step_plan import SequenceId, SequencePages
from .base import PooledSequence, final_pages

RAW_PAGES = 3  # of one request at most: the first, the newest full one, and the one that fills or was just filled


@dataclass
class SequenceTable:
    """The pages of one request: where each lies, and what is still reserved for it."""

    pages: int  # that it may fill; a packed slot is reserved for each that is not packed yet, and was not found here
    spare_packed: list[int]
    spare_raw: list[int]
    slots: list[int] = field(default_factory=list)  # of each page, in the pool that its kind says
    packed: tuple[int, int] = (0, 0)  # pages [from, to) are packed, all others raw
    view: SequencePages | None = None  # of these, for steps, until they change

    def filled(self) -> tuple[list[int], list[int]]:
        """The slots of its pages: those in the raw and those in the packed pool, in order."""
        start, end = self.packed
        return self.slots[:start] + self.slots[end:], self.slots[start:end]

    def fill(self, pages: int) -> None:
        """Gives each of the first pages that has none yet a slot of its kind."""
        for page in range(len(self.slots), pages):
            is_packed = self.packed[0] <= page < self.packed[1]
            self.slots.append((self.spare_packed if is_packed else self.spare_raw).pop())

    def pack_page(self, page: int, slot: int) -> None:
        """Notes that a page, the first after those that are packed, was packed into this slot."""
        self.spare_raw.append(self.slots[page])
        self.slots[page] = slot
        self.packed = (1, page + 1)
        self.view = None


class PackedPages:
    """The page tables of all requests, over two kinds of slots, and which pages are shared (see `KvPool`)."""

    def __init__(self, codec: str, pages: int, page_tokens: int, max_batch: int, *, cached_pages: int) -> None:
        self._codec_name, self.page_tokens, self._total = codec, page_tokens, pages
        self._packed_pages = PageTable(PageAllocator(pages), cached_pages)
        self.raw_slots = raw_pages(max_batch, cached=bool(cached_pages))
        self._raw_pages = PageTable(PageAllocator(self.raw_slots), max_batch if cached_pages else 0)
        self._tables: dict[SequenceId, SequenceTable] = {}

    @property
    def total_pages(self) -> int:
        return self._total

    @property
    def in_use(self) -> int:
        return max(self._packed_pages.in_use, self._raw_pages.in_use)

    @property
    def free_pages(self) -> int:
        return self._packed_pages.free

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def pages_of(self, sequence: PooledSequence) -> int:
        return self._tables[sequence.id].pages

    def counts(self) -> PageCounts:
        pages = self._packed_pages
        return PageCounts(total=self._total, free=pages.empty, cached=pages.cached, in_use=pages.in_use)

    def allocate(self, sequence: PooledSequence, tokens: int, preferred_tokens: int) -> bool:
        """Every page that it does not find here gets a packed slot, since any but the first may come to be packed."""
        addresses = sequence.reusable_addresses(self.page_tokens)
        found_raw = self._raw_pages.share_first(addresses[:1])
        found_packed = self._packed_pages.share_first(addresses[1:]) if found_raw else []
        found = len(found_raw) + len(found_packed)
        pages = max(self.pages_for(tokens), min(self.pages_for(preferred_tokens), self._packed_pages.empty + found))
        packed, raw = self._packed_pages.take(pages - found), self._raw_pages.take(RAW_PAGES - len(found_raw))
        if packed is None or raw is None:
            self._packed_pages.release(found_packed + (packed or []))
            self._raw_pages.release(found_raw + (raw or []))
            return False
        sequence.cached_tokens = found * self.page_tokens
        table = SequenceTable(pages, packed, raw, found_raw + found_packed)
        start, end = packed_range(sequence.prompt_tokens, self.page_tokens, packs=True)
        table.packed = (start // self.page_tokens, end // self.page_tokens)
        table.fill(self.pages_for(sequence.prompt_tokens))
        self._tables[sequence.id] = table
        return True

    def extend(self, sequence: PooledSequence, tokens: int) -> bool:
        table = self._tables[sequence.id]
        missing = self.pages_for(tokens) - table.pages
        more = self._packed_pages.take(missing) if missing > 0 else []
        if more is None:
            return False
        table.spare_packed += more
        table.pages += len(more)
        return True

    def trim(self, sequence: PooledSequence, tokens: int) -> bool:
        table = self._tables[sequence.id]
        surplus = [table.spare_packed.pop() for _ in range(table.pages - self.pages_for(tokens))]
        table.pages -= len(surplus)
        self._packed_pages.release(surplus)
        return bool(surplus)

    def allocate_saved(self, sequence: PooledSequence, tokens: int, packed: tuple[int, int]) -> SequenceTable | None:
        """Pages for a preempted request, of which pages [from, to) were packed; None where not so many are free."""
        pages = self.pages_for(tokens)
        spare_packed, spare_raw = self._packed_pages.take(pages), self._raw_pages.take(RAW_PAGES)
        if spare_packed is None or spare_raw is None:
            self._packed_pages.release(spare_packed or [])
            self._raw_pages.release(spare_raw or [])
            return None
        table = self._tables[sequence.id] = SequenceTable(pages, spare_packed, spare_raw, packed=packed)
        table.fill(self.pages_for(sequence.computed))
        return table

    def free(self, sequence: PooledSequence) -> None:
        table = self._tables.pop(sequence.id, None)
        if table:
            raw, packed = table.filled()
            self._raw_pages.release(raw + table.spare_raw)
            self._packed_pages.release(packed + table.spare_packed)

    def publish(self, sequence: PooledSequence, stored: int) -> None:
        self._publish_pages(sequence, final_pages(stored, self.page_tokens, packs=True))

    def _publish_pages(self, sequence: PooledSequence, pages: int) -> None:
        slots = self._tables[sequence.id].slots
        for page, address in enumerate(sequence.page_addresses(pages, self.page_tokens)):
            (self._packed_pages if page else self._raw_pages).publish(slots[page], address)

    def step_pages(self, sequence: PooledSequence, end: int) -> SequencePages:
        table = self._tables[sequence.id]
        if len(table.slots) < self.pages_for(end):
            table.slots.append(table.spare_raw.pop())  # no step fills more than one page of output
            table.view = None
        if table.view is None:
            table.view = SequencePages(tuple(table.slots), self._codec_name, table.packed)
        return table.view


def raw_pages(max_batch: int, *, cached: bool) -> int:
    """Raw pages beside the packed ones, of so many requests.

    `cached`: first pages are kept too, because without its first page no prefix is found.
    """
    return max_batch * (RAW_PAGES + cached)
