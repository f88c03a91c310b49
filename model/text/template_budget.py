"""What one rendering of a chat template may take: steps, work, text, time. Every bound is a number here.

Python cannot stop a thread, so whatever a template does says first what it will cost, and is refused where that is too
much. Costs are estimates from above, in units of about a nanosecond.
"""

import contextlib
import threading
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

MAX_TEXT = 16 << 20  # characters of one text
MAX_ITEMS = 1 << 20  # of one list
MAX_BITS = 4096  # of a whole number
MAX_NESTING = 64  # of lists and mappings in each other
MAX_WORK = 128 << 20
MAX_MADE = 64 << 20  # characters, and list entries, of all values that are made, kept or not
MAX_S = 4.0  # of the thread's own time: for what the estimates miss

CALL, ITEM = 128, 48  # work of a call, and of an item that is looked at
_LOOK_AT_CLOCK = 1 << 16  # work between two looks


class TooMuch(TemplateError):
    """A rendering that goes over a bound."""


class Budget:
    """What is left for one rendering, in one thread."""

    def __init__(self, steps: int) -> None:
        self._steps, self._left = steps, steps
        self._work, self._made = MAX_WORK, MAX_MADE
        self._looked_at = self._work
        self._ends_s = time.thread_time() + MAX_S

    def step(self) -> None:
        """Counts a turn of a loop or macro."""
        self._left -= 1
        if self._left < 0:
            raise TooMuch(f"it takes more than {self._steps} steps")

    def spend(self, work: int, made: int = 0) -> None:
        """Counts work that comes, and characters and list entries that it makes."""
        self._work -= work
        self._made -= made
        if self._work < 0:
            raise TooMuch("it computes too much")
        if self._made < 0:
            raise TooMuch(f"more than {MAX_MADE} characters and list entries are made on the way")
        if self._looked_at - self._work > _LOOK_AT_CLOCK:
            self._looked_at = self._work
            if time.thread_time() > self._ends_s:
                raise TooMuch(f"it computes for more than {MAX_S:g} s")

    def make_text(self, length: int) -> None:
        """Counts a text that comes to be."""
        if length > MAX_TEXT:
            raise TooMuch(f"a text of more than {MAX_TEXT} characters")
        self.spend(CALL + length, length)

    def make_items(self, length: int) -> None:
        """Counts a list that comes to be."""
        if length > MAX_ITEMS:
            raise TooMuch(f"a list of more than {MAX_ITEMS} items")
        self.spend(CALL + 2 * length, 2 * length)

    def weigh(self, value: Any) -> int:
        """The characters of a value as text, about; counts the work of looking through it."""
        if isinstance(value, str):
            self.spend(len(value))
            return len(value)
        total, pending = 0, [(value, 0)]
        while pending:
            item, depth = pending.pop()
            if depth > MAX_NESTING:
                raise TooMuch(f"values nested more than {MAX_NESTING} deep")
            parts = _parts(item)
            if parts is None:
                total += _length(item)
            else:
                total += 2 * len(parts) + 2
                self.spend(ITEM * (len(parts) + 1))
                pending += [(part, depth + 1) for part in parts]
        self.spend(total)
        return total

    def count_items(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items, each counted when it is taken."""
        for item in items:
            self.spend(CALL)
            yield item


def _parts(item: Any) -> Sequence[Any] | None:
    if isinstance(item, Namespace):
        item = object.__getattribute__(item, "_Namespace__attrs")
    if isinstance(item, dict):
        return [*item, *item.values()]
    if isinstance(item, list | tuple):
        return item
    return tuple(item) if isinstance(item, set | frozenset | KeysView | ItemsView | ValuesView) else None


def _length(item: Any) -> int:
    if isinstance(item, str | bytes | range):
        return len(item) + 2
    if isinstance(item, int) and item.bit_length() > MAX_BITS:
        raise TooMuch(f"a number of more than {MAX_BITS} bits")
    return 16 + (item.bit_length() // 3 if isinstance(item, int) else 0)


_thread = threading.local()


def budget() -> Budget:
    """That of the rendering in this thread."""
    return _thread.budget


@contextlib.contextmanager
def spending(new: Budget) -> Iterator[Budget]:
    """Makes a budget that of this thread."""
    _thread.budget = new
    try:
        yield new
    finally:
        del _thread.budget
