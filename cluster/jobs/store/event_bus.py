"""Tells subscribers of events that were committed, in this process or, found by asking the database, in another."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ....proto.jobs_pb2 import JobEvent

MAX_BUFFERED = 1000  # events that a slow subscriber may leave here; it reads the others from the database


class Subscription:
    """The events of one job for one subscriber."""

    def __init__(self) -> None:
        self._events: list[JobEvent] = []
        self._changed = asyncio.Event()
        self.last = 0  # the newest number that is known of

    def push(self, event: JobEvent) -> None:
        """Takes in an event that was committed."""
        if len(self._events) < MAX_BUFFERED:
            self._events.append(event)
        self.push_last(event.number)

    def push_last(self, number: int) -> None:
        """Takes in that events up to this number are in the database."""
        self.last = max(self.last, number)
        self._changed.set()

    def take(self) -> list[JobEvent]:
        """The events since the last time, in order; with gaps where the subscriber was slow."""
        taken, self._events = self._events, []
        self._changed.clear()
        return taken

    async def wait(self) -> None:
        """Returns when there is something to take, or to read."""
        await self._changed.wait()


class EventBus:
    """Belongs to the event loop of its gateway."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, set[Subscription]] = {}
        self.listeners: list[Callable[[str, JobEvent], None]] = []  # are called with new states of any job

    @contextlib.contextmanager
    def subscribed(self, job_id: str) -> Iterator[Subscription]:
        """A subscription to a job's events for as long as the block runs."""
        subscription = Subscription()
        self._subscriptions.setdefault(job_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions[job_id].discard(subscription)
            if not self._subscriptions[job_id]:
                del self._subscriptions[job_id]

    def publish(self, events: Sequence[tuple[str, JobEvent]]) -> None:
        """Events that were committed, each job's in order."""
        for job_id, event in events:
            for subscription in self._subscriptions.get(job_id, ()):
                subscription.push(event)
            if event.HasField("state"):
                for listener in self.listeners:
                    listener(job_id, event)

    @property
    def watched(self) -> list[str]:
        """The jobs that have a subscriber."""
        return list(self._subscriptions)

    def publish_last(self, asked: Iterable[str], last_events: Mapping[str, int]) -> None:
        """The newest events of jobs by the database; a job that is gone from it counts as changed, too."""
        for job_id in asked:
            for subscription in self._subscriptions.get(job_id, ()):
                last = last_events.get(job_id)
                if last is None or last > subscription.last:
                    subscription.push_last(last or 0)
