"""Progress of something that starts in several steps side by side, on stderr."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...proto.errors import IsthmusError

Tell = Callable[[str], None]  # what the work of a step is at, in a few words
Step = Callable[[str], AbstractContextManager[Tell]]  # around the work that the name tells of

ASK_S = 1.0  # between two questions what a step is at
LINE_S, SAME_LINE_S = 5.0, 30.0  # between two lines of one step, and two that say the same, without a terminal

T = TypeVar("T")


@contextmanager
def unseen(name: str) -> Iterator[Tell]:
    """A step that nobody watches."""
    yield lambda doing: None


async def telling(work: Awaitable[T], activity: Callable[[], Awaitable[str]], tell: Tell) -> T:
    """What `work` returns or raises; while it runs, `activity` is asked what it is at, and that is told."""
    running = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({running}, timeout=ASK_S))[0]:
            with contextlib.suppress(IsthmusError, OSError):  # who cannot answer fails in `work` too
                tell(await activity())
        return running.result()
    finally:
        running.cancel()


class ShownSteps:
    """Spinners where stderr is a terminal; elsewhere one line for each finished step, and for what a long one is at."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._progress = (
            Progress(
                SpinnerColumn(finished_text="[green]✓[/]"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[Tell]:
        """Shows `name` as running until the block ends, and as done where it ends well."""
        progress, start_s = self._progress, time.monotonic()
        if progress is not None:
            task = progress.add_task(escape(name), total=1)
            yield lambda doing: progress.update(task, description=escape(f"{name}: {doing}" if doing else name))
            progress.update(task, description=escape(name), completed=1)
            return
        told, told_s = "", start_s

        def tell(doing: str) -> None:
            nonlocal told, told_s
            now_s = time.monotonic()
            if doing and now_s - told_s >= (SAME_LINE_S if doing == told else LINE_S):
                told, told_s = doing, now_s
                self._line(f"… {name}: {doing} ({now_s - start_s:.0f} s)")

        yield tell
        self._line(f"✓ {name} ({time.monotonic() - start_s:.1f} s)")

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)
