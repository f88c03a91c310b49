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

SetActivity = Callable[[str], None]  # takes what a step is doing, in a few words
ProgressStep = Callable[[str], AbstractContextManager[SetActivity]]  # around the work of a step, by its name

POLL_S = 1.0  # between two questions what a step is doing
LINE_S, SAME_LINE_S = 5.0, 30.0  # between two lines of one step, and two that say the same, without a terminal

T = TypeVar("T")


@contextmanager
def no_progress(name: str) -> Iterator[SetActivity]:
    """A step that is not shown."""
    yield lambda activity: None


async def with_activity(work: Awaitable[T], activity: Callable[[], Awaitable[str]], set_activity: SetActivity) -> T:
    """What `work` returns or raises; while it runs, `activity` is asked what it is doing, and that is shown."""
    running = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({running}, timeout=POLL_S))[0]:
            with contextlib.suppress(IsthmusError, OSError):  # who cannot answer fails in `work` too
                set_activity(await activity())
        return running.result()
    finally:
        running.cancel()


async def with_lines(work: Awaitable[T], activity: Callable[[], Awaitable[str]], line: Callable[[str], None]) -> T:
    """As `with_activity`; a line each LINE_S, none of what is over before."""
    shown_s = time.monotonic()

    def tell(doing: str) -> None:
        nonlocal shown_s
        if doing and time.monotonic() - shown_s >= LINE_S:
            shown_s = time.monotonic()
            line(f"… {doing}")

    return await with_activity(work, activity, tell)


class StartProgress:
    """Spinners where stderr is a terminal; elsewhere one line for each finished step, and for the activity of a long
    one."""

    def __init__(self, line: Callable[[str], None] | None = None) -> None:
        """`line` takes the lines, and then there are no spinners."""
        self._console, self._print = Console(file=sys.stderr), line
        self._progress = (
            Progress(
                SpinnerColumn(finished_text="[green]✓[/]"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            if line is None and self._console.is_terminal
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
    def step(self, name: str) -> Iterator[SetActivity]:
        """Shows `name` as running until the block ends, and as done where it ends well."""
        progress, start_s = self._progress, time.monotonic()
        if progress is not None:
            task = progress.add_task(escape(name), total=1)
            yield lambda activity: progress.update(
                task, description=escape(f"{name}: {activity}" if activity else name)
            )
            progress.update(task, description=escape(name), completed=1)
            return
        shown, shown_s = "", start_s

        def set_activity(activity: str) -> None:
            nonlocal shown, shown_s
            now_s = time.monotonic()
            if activity and now_s - shown_s >= (SAME_LINE_S if activity == shown else LINE_S):
                shown, shown_s = activity, now_s
                self._line(f"… {name}: {activity} ({now_s - start_s:.0f} s)")

        yield set_activity
        self._line(f"✓ {name} ({time.monotonic() - start_s:.1f} s)")

    def _line(self, text: str) -> None:
        if self._print is not None:
            return self._print(text)
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)
