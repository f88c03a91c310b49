"""Pages of a pool that several sequences share: reference counts, an index by content, and pages that nobody uses now.

Pure bookkeeping, as the allocator: no tensors, no locks; one thread uses it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from .allocator import PageAllocator, Run

EVICT_AHEAD = 1 / 64  # of the pool, evicted beyond what is asked for: what lay together is empty together


class PageTable:
    """Counts the users of each page. A page with content that may be asked for again stays when its last user goes.

    Whoever gets pages from `take` or `share` owns one reference to each and gives it to `release`, once. A shared
    page, and one that was published, is never written again: a sequence writes to pages that it took, and only
    behind what it published (what the field calls copy-on-write never comes to copying, since whole pages are shared
    and new tokens go to new pages).
    """

    def __init__(self, allocator: PageAllocator, cached_at_most: int | None = None) -> None:
        """`cached_at_most`: pages kept with no user; None: as many as the pool has; 0: nothing is shared."""
        self._allocator = allocator
        self._cached_at_most = allocator.total if cached_at_most is None else cached_at_most
        self._users: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, no user; the one unused for longest is first

    @property
    def free(self) -> int:
        """Pages that `take` can hand out: free ones, and cached ones that it would evict."""
        return self._allocator.free + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that hold content for which nobody has a use now."""
        return len(self._idle)

    @property
    def in_use(self) -> int:
        return len(self._users)

    def holds(self, page_hash: bytes) -> bool:
        """Whether a page of that content is here."""
        return page_hash in self._page_of

    def share(self, page_hash: bytes) -> int | None:
        """The page of that content, with one more user, or None."""
        page = self._page_of.get(page_hash)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
        return page

    @property
    def empty(self) -> int:
        """Pages with no content: what `take` hands out before it evicts any."""
        return self._allocator.free

    def share_first(self, page_hashes: Iterable[bytes]) -> list[int]:
        """The pages of the first of these contents, up to one that is not here, with one more user each."""
        shared: list[int] = []
        for page_hash in page_hashes:
            page = self.share(page_hash)
            if page is None:
                break
            shared.append(page)
        return shared

    def take(self, pages: int, after: int | None = None) -> list[int] | None:
        """So many empty pages, in ascending runs as long as can be, or None where there are not enough.

        Those right behind the page `after` go first.
        """
        if pages > self.free:
            return None
        if pages > self._allocator.free:
            self._evict(pages - self._allocator.free + int(EVICT_AHEAD * self._allocator.total))
        runs = self._allocator.take(pages, after)
        assert runs is not None
        taken = [page for run in runs for page in range(run.first, run.end)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def publish(self, page: int, page_hash: bytes) -> None:
        """Says what a full page holds, so that others can share it; the first page of one content stands for it."""
        assert page in self._users, f"page {page} has no user"
        if not self._cached_at_most:
            return
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def release(self, pages: Sequence[int]) -> None:
        """Gives back references. The end of a sequence becomes evictable before its beginning, which more share."""
        empty = []
        for page in reversed(pages):
            self._users[page] -= 1  # KeyError: released more often than taken
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._hash_of:
                self._idle[page] = None
            else:
                empty.append(page)
        self._allocator.give_back(runs_of(sorted(empty)))
        self._evict(len(self._idle) - self._cached_at_most)

    def _evict(self, pages: int) -> None:
        evicted = []
        while self._idle and len(evicted) < pages:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
            evicted.append(page)
        self._allocator.give_back(runs_of(sorted(evicted)))

    def check(self) -> None:
        """AssertionError where free, cached and used pages do not add up."""
        self._allocator.check()
        total = self._allocator.free + len(self._idle) + len(self._users)
        assert total == self._allocator.total, f"{total} pages of {self._allocator.total} are accounted for"
        assert self._page_of == {page_hash: page for page, page_hash in self._hash_of.items()}
        assert self._idle.keys() <= self._hash_of.keys()
        assert not self._idle.keys() & self._users.keys()


def runs_of(pages: Iterable[int]) -> tuple[Run, ...]:
    """The same pages, in order, as runs."""
    pages = list(pages)
    cuts = [0, *(at + 1 for at, (a, b) in enumerate(pairwise(pages)) if b != a + 1), len(pages)]
    return tuple(Run(pages[low], high - low) for low, high in pairwise(cuts) if low < high)
