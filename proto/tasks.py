"""Background tasks that do not die silently. Whoever needs some owns a `Tasks`, which starts, watches and ends them.

tasks = Tasks()
tasks.start("look for silence", self._look)  # until `stop`; where it raises, it is logged, counted and started again
tasks.failing                                # those that fail again and again: their owner is not healthy
await tasks.stop()
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .backoff import backoff_s

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0  # before a task that failed is started again
STEADY_S = 10.0  # once a task has run for so long, its last failure does not count
PATIENCE = 3  # failures in a row before a task counts as failing


@dataclass(eq=False)
class _Record:
    """What is known of a running task."""

    name: str
    vital: bool  # its owner is not healthy while it fails
    failures: int = 0  # in a row
    began_s: float = 0.0  # when its last try began

    @property
    def failing(self) -> bool:
        """Whether it does not get its work done. Between two tries too: a try that has only begun has done nothing."""
        return self.failures >= PATIENCE and time.monotonic() - self.began_s < STEADY_S


class Tasks:
    """The background tasks of one owner, in its event loop."""

    def __init__(self, failures: "Counter[str] | None" = None) -> None:
        """`failures` counts unexpected exceptions, by name of the task; owners may share one."""
        self.failures = Counter[str]() if failures is None else failures
        self._running: dict[asyncio.Task[None], _Record] = {}

    def start(
        self, name: str, run: Callable[[], Coroutine[Any, Any, None]], *, about: str = "", vital: bool = True
    ) -> asyncio.Task[None]:
        """Runs `run` to its end; where it raises, it is run again after a pause that grows.

        `about` says which of several with this name it is. One that is not `vital` is never among the failing.
        """
        record = _Record(name, vital)
        return self._add(self._keep(record, run, about), record, about)

    def once(
        self,
        name: str,
        run: Callable[[], Coroutine[Any, Any, None]],
        *,
        about: str = "",
        on_failure: Callable[[Exception], None] | None = None,
    ) -> asyncio.Task[None]:
        """Runs `run` once; where it raises, `on_failure` is called, which has to end what waits for it."""

        async def once() -> None:
            with self.noted(name, about, on_failure):
                await run()

        return self._add(once(), _Record(name, vital=False), about)

    @property
    def failing(self) -> list[str]:
        """The names of vital tasks that fail again and again."""
        return sorted({record.name for record in self._running.values() if record.vital and record.failing})

    def note(self, name: str, error: Exception, about: str = "") -> None:
        """Logs an unexpected exception with its trace, and counts it."""
        self.failures[name] += 1
        log.error("a bug in a background task", exc_info=error, extra={"fields": {"task": name, "about": about}})

    @contextlib.contextmanager
    def noted(
        self, name: str, about: str = "", on_failure: Callable[[Exception], None] | None = None
    ) -> Iterator[None]:
        """Swallows an exception of the block: it is noted, and `on_failure` is called with it.

        A cancellation of this task goes through; one of something that it waited for is an exception like others.
        """
        try:
            yield
            return
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            failed: Exception = RuntimeError("what it waited for was cancelled")
            failed.__cause__ = error
        except Exception as error:
            failed = error
        self.note(name, failed, about)
        if on_failure is not None:
            on_failure(failed)

    async def end(self, *tasks: asyncio.Task[None]) -> None:
        """Cancels tasks and waits until they are gone, whatever they end with."""
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Ends all of them."""
        await self.end(*self._running)

    def _add(self, run: Coroutine[Any, Any, None], record: _Record, about: str) -> asyncio.Task[None]:
        task = asyncio.create_task(run, name=f"{record.name} {about}".strip())
        self._running[task] = record
        task.add_done_callback(lambda _: self._running.pop(task, None))
        return task

    async def _keep(self, record: _Record, run: Callable[[], Coroutine[Any, Any, None]], about: str) -> None:
        done = False
        while not done:
            record.began_s = time.monotonic()
            failed: list[Exception] = []
            with self.noted(record.name, about, failed.append):
                await run()
            done = not failed
            if failed:
                steady = time.monotonic() - record.began_s >= STEADY_S
                record.failures = 1 if steady else record.failures + 1
                await asyncio.sleep(backoff_s(record.failures, FIRST_PAUSE_S, LAST_PAUSE_S))


async def together(runs: Sequence[Awaitable[None]]) -> None:
    """All of them to their ends; where one fails the others are cancelled, and its error is raised."""
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
