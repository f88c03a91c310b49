"""Pages of a pool that several sequences share: reference counts, an index by content, and pages that nobody uses now.

Pure bookkeeping, as the allocator: no tensors, no locks; one thread uses it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from .allocator import PageAllocator, Run


class PageTable:
    """Counts the users of each page. A page with content that may be asked for again stays when its last user goes.

    Whoever gets pages from `take` or `share` owns one reference to each and gives it to `release`, once. A shared
    page, and one that was published, is never written again: a sequence writes to pages that it took, and only
    behind what it published (what the field calls copy-on-write never comes to copying, since whole pages are shared
    and new tokens go to new pages).
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
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

    def take(self, pages: int) -> list[int] | None:
        """So many empty pages, in ascending runs as long as can be, or None where there are not enough."""
        if pages > self.free:
            return None
        while self._allocator.free < pages:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
            self._allocator.give_back((Run(page, 1),))
        runs = self._allocator.take(pages)
        assert runs is not None
        taken = [page for run in runs for page in range(run.first, run.end)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def publish(self, page: int, page_hash: bytes) -> None:
        """Says what a full page holds, so that others can share it; the first page of one content stands for it."""
        assert page in self._users, f"page {page} has no user"
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def release(self, pages: Sequence[int]) -> None:
        """Gives back references. The end of a sequence becomes evictable before its beginning, which more share."""
        for page in reversed(pages):
            self._users[page] -= 1  # KeyError: released more often than taken
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._hash_of:
                self._idle[page] = None
            else:
                self._allocator.give_back((Run(page, 1),))

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
