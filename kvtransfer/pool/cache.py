"""The host page cache: encoded pages in host memory, by content. It is the send buffer and the prefix cache in one.

A page that is being sent is pinned by whoever sends it; a page that nobody sends stays until room is needed, and the
one unused for longest goes first.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable

from ..encoded import EncodedPage, PageKey


class PageCache:
    """Encoded full pages under a bound of bytes. Any thread may use it.

    Who takes or adds a page pins it and must release it once. Pinned pages are never evicted: with more of them than
    the bound allows, the cache is over it until they are released.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._pages: OrderedDict[PageKey, EncodedPage] = OrderedDict()  # the one unused for longest is first
        self._pins: Counter[PageKey] = Counter()
        self._lock = threading.Lock()
        self.bytes = 0
        self.pinned_bytes = 0  # of these
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._pages

    @property
    def pinned(self) -> int:
        """Pages that somebody holds."""
        return len(self._pins)

    def take(self, key: PageKey) -> EncodedPage | None:
        """The page of that content, pinned, or None."""
        with self._lock:
            page = self._pages.get(key)
            if page is not None:
                self._pin(page, key)
            return page

    def add(self, page: EncodedPage) -> EncodedPage:
        """Keeps a page; returns it pinned, or the one of the same content that was there already."""
        assert page.key is not None, "a page that is not full has no address"
        with self._lock:
            kept = self._pages.setdefault(page.key, page)
            self._pin(kept, page.key)
            if kept is page:
                self.bytes += page.nbytes
                self._evict()
            return kept

    def release(self, pages: Iterable[EncodedPage]) -> None:
        """Unpins pages, each as often as it is given."""
        with self._lock:
            for page in pages:
                assert page.key is not None and self._pins[page.key] > 0, "a page was released twice"
                self._pins[page.key] -= 1
                if not self._pins[page.key]:
                    del self._pins[page.key]
                    self.pinned_bytes -= page.nbytes
            self._evict()

    def _pin(self, page: EncodedPage, key: PageKey) -> None:
        self._pages.move_to_end(key)
        self._pins[key] += 1
        if self._pins[key] == 1:
            self.pinned_bytes += page.nbytes

    def _evict(self) -> None:
        while self.bytes > self._limit:
            oldest = next((key for key in self._pages if key not in self._pins), None)
            if oldest is None:
                return
            self.bytes -= self._pages.pop(oldest).nbytes
            self.evicted += 1
