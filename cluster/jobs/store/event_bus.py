"""Tells watchers of events that were committed, in this process or, found by asking the database, in another."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ....proto.jobs_pb2 import JobEvent

HELD = 1000  # events that a slow watcher may leave here; it reads the others from the database


class Subscription:
    """The news of one job for one watcher."""

    def __init__(self) -> None:
        self._events: list[JobEvent] = []
        self._news = asyncio.Event()
        self.last = 0  # the newest number that was heard of

    def push(self, event: JobEvent) -> None:
        """An event that was committed."""
        if len(self._events) < HELD:
            self._events.append(event)
        self.heard(event.number)

    def heard(self, number: int) -> None:
        """That events up to this number are there."""
        self.last = max(self.last, number)
        self._news.set()

    def take(self) -> list[JobEvent]:
        """The events since the last time, in order; with gaps where the watcher was slow."""
        taken, self._events = self._events, []
        self._news.clear()
        return taken

    async def wait(self) -> None:
        """Until there is something to take, or to read."""
        await self._news.wait()


class Hub:
    """Belongs to the event loop of its gateway."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[Subscription]] = {}
        self.listeners: list[Callable[[str, JobEvent], None]] = []  # are told of new states of any job

    @contextlib.contextmanager
    def subscribed(self, job_id: str) -> Iterator[Subscription]:
        """Hears of a job's events for as long as the block runs."""
        subscription = Subscription()
        self._watchers.setdefault(job_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            self._watchers[job_id].discard(subscription)
            if not self._watchers[job_id]:
                del self._watchers[job_id]

    def publish(self, events: Sequence[tuple[str, JobEvent]]) -> None:
        """Events that were committed, each job's in order."""
        for job_id, event in events:
            for watcher in self._watchers.get(job_id, ()):
                watcher.push(event)
            if event.HasField("state"):
                for listener in self.listeners:
                    listener(job_id, event)

    @property
    def watched(self) -> list[str]:
        """The jobs that somebody watches."""
        return list(self._watchers)

    def found(self, asked: Iterable[str], last_events: Mapping[str, int]) -> None:
        """What the database says of the jobs that it was asked for; one that is not there any more is news too."""
        for job_id in asked:
            for watcher in self._watchers.get(job_id, ()):
                last = last_events.get(job_id)
                if last is None or last > watcher.last:
                    watcher.heard(last or 0)
