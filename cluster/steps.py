"""Progress of something that starts in several steps side by side, on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Step = Callable[[str], AbstractContextManager[object]]  # around the work that the name tells of


class ShownSteps:
    """Spinners where stderr is a terminal; elsewhere one line for each finished step."""

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
    def step(self, name: str) -> Iterator[None]:
        """Shows `name` as running until the block ends; as done where it ends well."""
        start_s = time.monotonic()
        task = self._progress.add_task(name, total=1) if self._progress is not None else None
        yield
        if self._progress is not None and task is not None:
            self._progress.update(task, completed=1)
        else:
            self._console.print(f"✓ {name} ({time.monotonic() - start_s:.1f} s)", highlight=False, soft_wrap=True)
