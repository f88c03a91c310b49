"""How far a calibration is, on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

_LINES = 4


@contextmanager
def told(what: str) -> Iterator[Callable[[int, int], None]]:
    """`progress(done, of)`, which draws a bar on a terminal, and writes a line at each quarter elsewhere."""
    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)
        return
    written = 0

    def write(done: int, of: int) -> None:
        nonlocal written
        if done * _LINES // of > written:
            written = done * _LINES // of
            print(f"{what}: {100 * done // of} %", file=sys.stderr, flush=True)

    print(what, file=sys.stderr, flush=True)
    yield write
