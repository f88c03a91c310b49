"""Who owns which page of a pool. Pure bookkeeping: no tensors, no locks; one thread uses it."""

from bisect import insort
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """`pages` consecutive pages from `first` on."""

    first: int
    pages: int

    @property
    def end(self) -> int:
        return self.first + self.pages


class PageAllocator:
    """Hands out pages in runs as long as it can, so that attention reads long contiguous ranges of memory.

    Whoever gets runs from `take` owns them until it gives all of them to `give_back`, once.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._gaps = [Run(0, total)] if total else []  # free runs by first page; no two touch

    @property
    def in_use(self) -> int:
        return self.total - self.free

    def take(self, pages: int, after: int | None = None) -> tuple[Run, ...] | None:
        """Runs of `pages` pages in all, or None where not so many are free.

        First what is free right behind the page `after`. Then one run from the smallest gap that holds it; otherwise
        pieces of the largest gaps.
        """
        if pages > self.free:
            return None
        behind = next((gap for gap in self._gaps if gap.first - 1 == after), None)
        if behind and pages:
            run = self._cut(behind, min(pages, behind.pages))
            rest = self.take(pages - run.pages)
            assert rest is not None, "the free count is wrong"
            return (run, *rest)
        if not pages:
            return ()
        fitting = [gap for gap in self._gaps if gap.pages >= pages]
        if fitting:
            return (self._cut(min(fitting, key=lambda gap: gap.pages), pages),)
        taken: list[Run] = []
        for gap in sorted(self._gaps, key=lambda gap: -gap.pages):
            if pages:
                taken.append(self._cut(gap, min(pages, gap.pages)))
                pages -= taken[-1].pages
        return tuple(taken)

    def give_back(self, runs: tuple[Run, ...]) -> None:
        """Frees runs that `take` returned. AssertionError where one of their pages is free already."""
        for run in runs:
            insort(self._gaps, run, key=lambda gap: gap.first)
            self.free += run.pages
        merged: list[Run] = []
        for gap in self._gaps:
            if merged and merged[-1].end > gap.first:
                raise AssertionError(f"page {gap.first} was freed twice")
            if merged and merged[-1].end == gap.first:
                before = merged.pop()
                gap = Run(before.first, before.pages + gap.pages)
            merged.append(gap)
        self._gaps = merged

    def check(self) -> None:
        """AssertionError where the gaps do not add up to the free count."""
        gaps = sum(gap.pages for gap in self._gaps)
        assert gaps == self.free <= self.total, f"{gaps} pages in gaps, {self.free} free of {self.total}"

    def _cut(self, gap: Run, pages: int) -> Run:
        index = self._gaps.index(gap)
        rest = Run(gap.first + pages, gap.pages - pages)
        self._gaps[index : index + 1] = [rest] if rest.pages else []
        self.free -= pages
        return Run(gap.first, pages)
