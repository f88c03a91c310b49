"""What of a prompt need not be computed: the three places where its beginning may be.

    pool        dense pages of recent prompts: exactly what computing them again would give
    host cache  encoded pages: sent as they are; decoded into the pool where the rest of the prompt needs them
    store       files, fetched into the host cache before the engine sees the job

The prefix ends before the first page that is in none of them in a form that this prompt can use (`Prompt.usable_keys`).
Pages that are decoded from packed bytes are what a decode worker has anyway, but not what was computed: in the pool
they have a name of their own, and serve only beside the bytes that they come from.
"""

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

from ..kvtransfer.encoded import EncodedPage, EncodedSection, exact_encoding
from ..kvtransfer.page import Section, sections
from ..kvtransfer.pool.cache import PageCache
from ..kvtransfer.pool.dense import DensePool
from ..kvtransfer.pool.table import PageTable
from ..kvtransfer.storage.store import PageStore
from ..proto.errors import IsthmusError
from .job import PrefillJob, Prompt

_FETCH_S = 2.0  # a store that answers no faster than this is not worth waiting for
_READERS = 4
_ENCODE_PAGES = 8  # at once, of a layer


class PrefixCache:
    """Finds, loads, sends and keeps pages. The engine thread alone uses it, but for `fetch` and `close`."""

    def __init__(self, pool: DensePool, host: PageCache, store: PageStore | None) -> None:
        self._pool, self._host, self._store = pool, host, store
        self.table = PageTable(pool.allocator)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="page-store-read")
        self.fetch_timeouts = 0

    async def fetch(self, job: PrefillJob) -> None:
        """Brings the pages of a prompt from the store to the host cache, before the job is given to the engine."""
        if self._store is None:
            return
        reading = self._readers.submit(_read_prefix, job.prompt, self._host, self._store)
        try:
            job.pinned += await asyncio.wait_for(asyncio.wrap_future(reading), _FETCH_S)
            job.fetched = frozenset(page.key.hash for page in job.pinned if page.key)
        except TimeoutError:
            self.fetch_timeouts += 1
            reading.add_done_callback(self._unpin_late)
        except asyncio.CancelledError:
            reading.add_done_callback(self._unpin_late)
            raise

    def guess(self, job: PrefillJob) -> int:
        """How many tokens of a prompt would need no computing if it began now."""
        prompt = job.prompt
        page = 0
        while page < prompt.reusable_pages and self._is_here(prompt, page):
            page += 1
        return page * self._pool.page_tokens

    def allocate(self, job: PrefillJob) -> int | None:
        """Gives a job its pages of the pool, those of its cached prefix filled and on their way to the receiver.

        Returns the tokens that need no computing, or None where there are not enough free pages.
        """
        found, pinned = self._find(job.prompt)
        shared = [source for source in found if isinstance(source, int)]
        missing = self._pool.pages_for(len(job.token_ids)) - len(shared)
        fresh = self.table.take(missing, after=shared[-1] if shared else None)
        if fresh is None:
            self.table.release(shared)
            self._host.release(pinned)
            return None
        own = iter(fresh)
        job.set_pages([*(source if isinstance(source, int) else next(own) for source in found), *own])
        job.pinned += pinned
        try:
            self._load(job, found)
            self._send(job, len(found))
        except IsthmusError as error:
            job.failure = error
        return len(found) * self._pool.page_tokens

    def store_computed(self, job: PrefillJob, start: int, end: int) -> None:
        """Keeps the pages of the tokens [start, end) of a prompt, which are computed and encoded now."""
        size = self._pool.page_tokens
        for page in range(start // size, end // size):
            self.table.publish(job.pages.slots[page], job.prompt.page_hash(page))
        self._keep_encoded(job, job.sender.finished())

    def free_pages(self, job: PrefillJob) -> None:
        """Frees a job's pages of the pool; those with content stay until their room is needed."""
        self.table.release(job.pages.slots)
        job.set_pages(())

    def unpin_pages(self, job: PrefillJob) -> None:
        """Unpins a job's pages of the host cache, once its call has ended."""
        self._host.release(job.pinned)
        job.pinned = []

    def close(self) -> None:
        """Writes what waits for the store. From any thread."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._store:
            self._store.close()

    def _is_here(self, prompt: Prompt, page: int) -> bool:
        if self.table.holds(prompt.page_hash(page)):
            return True
        return any(key in self._host for key in prompt.usable_keys(page))

    def _find(self, prompt: Prompt) -> tuple[list[int | EncodedPage], list[EncodedPage]]:
        """For each page of the cached prefix a shared page of the pool or a pinned encoded one; and those encoded."""
        found: list[int | EncodedPage] = []
        pinned: list[EncodedPage] = []
        for page in range(prompt.reusable_pages):
            shared = self.table.share(prompt.page_hash(page))
            if shared is not None:
                found.append(shared)
                continue
            encoded = next(filter(None, map(self._host.take, prompt.usable_keys(page))), None)
            if encoded is None:
                break
            decoded = self.table.share(_decoded(encoded))
            found.append(encoded if decoded is None else decoded)
            pinned.append(encoded)
        return found, pinned

    def _load(self, job: PrefillJob, found: Sequence[int | EncodedPage]) -> None:
        """Decodes the encoded pages of a prefix into the job's pages of the pool."""
        missing = [(page, source) for page, source in enumerate(found) if isinstance(source, EncodedPage)]
        # Consecutive pages in one encoding go together: their distance to their rank is the same.
        runs = groupby(enumerate(missing), key=lambda item: (item[1][0] - item[0], item[1][1].encoding))
        for _, run in runs:
            items = [item for _, item in run]
            first, pages = items[0][0], [source for _, source in items]
            for layer in range(len(self._pool.keys)):
                keys, values = job.prompt.form.decode(layer, pages, self._pool.keys[layer].device)
                self._pool.write(layer, job.runs, first * self._pool.page_tokens, keys, values)
            exact = pages[0].encoding == exact_encoding(self._pool.keys[0].dtype)
            for page, source in items:
                self.table.publish(job.pages.slots[page], job.prompt.page_hash(page) if exact else _decoded(source))

    def _send(self, job: PrefillJob, cached_pages: int) -> None:
        """Queues the cached pages that the receiver does not hold, encoding those that are not in their form yet."""
        prompt, size = job.prompt, self._pool.page_tokens
        wanted = range(prompt.receiver_pages, cached_pages)
        kept = {page: cached for page in wanted if (cached := self._host.take(prompt.key(page)))}
        job.pinned += kept.values()
        self._write_to_store(job, kept.values())
        kept |= self._encode(job, [page for page in wanted if page not in kept])
        stored = sum(prompt.page_hash(page) in job.fetched for page in wanted)
        job.stored_tokens, job.cached_tokens = stored * size, (len(wanted) - stored) * size
        encoded: list[EncodedSection] = []
        due = job.sender.advance(cached_pages * size)
        for layer in range(len(self._pool.keys)):
            for section in due:
                pages = [kept[start // size] for start in range(section.start, section.end, size)]
                encoded.append(job.sender.resend(layer, section, pages))
        job.outbox.put(encoded, flush=True)

    def _encode(self, job: PrefillJob, pages: Sequence[int]) -> dict[int, EncodedPage]:
        """Encodes pages of the pool that nobody has in the form that this prompt sends."""
        size, done = self._pool.page_tokens, dict[int, EncodedPage]()
        for section in _runs(job.prompt, pages):
            for layer in range(len(self._pool.keys)):
                keys, values = self._pool.read(layer, job.runs, section.start, section.end)
                job.sender.encode_pages(layer, section, keys, values)
            fresh = self._keep_encoded(job, job.sender.finished())
            done |= zip(range(section.start // size, section.end // size), fresh, strict=True)
        return done

    def _keep_encoded(self, job: PrefillJob, pages: Sequence[EncodedPage]) -> list[EncodedPage]:
        kept = [self._host.add(page) for page in pages]
        job.pinned += kept
        self._write_to_store(job, kept)
        return kept

    def _write_to_store(self, job: PrefillJob, pages: Iterable[EncodedPage]) -> None:
        if self._store:
            for page in pages:
                self._store.enqueue(job.prompt.form, page, job.prompt.tenant)

    def _unpin_late(self, reading: Future[list[EncodedPage]]) -> None:
        if not reading.cancelled() and not reading.exception():
            self._host.release(reading.result())


def _decoded(page: EncodedPage) -> bytes:
    """The name in the pool of what a page decodes to, where that is not exactly what was computed.

    It stands for nothing but these bytes: it is used beside them, and nothing is encoded from it in a better form.
    """
    assert page.key is not None
    return page.encoding.encode() + page.key.hash


def _runs(prompt: Prompt, pages: Sequence[int]) -> Iterable[Section]:
    """Consecutive pages in one encoding, a few at once; a raw one is on its own."""
    size, packs = prompt.form.page_tokens, prompt.form.codec.packs
    for _, run in groupby(enumerate(pages), key=lambda item: item[1] - item[0]):
        numbers = [page for _, page in run]
        yield from sections(
            *(numbers[0] * size, (numbers[-1] + 1) * size, len(prompt.token_ids), size),
            packs=packs,
            max_tokens=_ENCODE_PAGES * size,
        )


def _read_prefix(prompt: Prompt, host: PageCache, store: PageStore) -> list[EncodedPage]:
    """Reads the leading pages that the host cache lacks into it, up to the first that the store lacks; pins them.

    As many bytes as the prompt's encoded pages take at most: its share of the send buffer has room for as many again.
    """
    pinned: list[EncodedPage] = []
    left = prompt.encoded_bytes
    for page in range(prompt.reusable_pages):
        keys = prompt.usable_keys(page)
        if any(key in host for key in keys):
            continue
        read = next(filter(None, (store.read(prompt.form, key, prompt.tenant) for key in keys)), None)
        if read is None or (left := left - read.nbytes) < 0:
            break
        pinned.append(host.add(read))
    return pinned
