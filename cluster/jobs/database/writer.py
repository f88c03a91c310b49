"""The one thread that writes to the database of jobs, many callers' changes in one transaction (group commit).

While a transaction commits, which waits for the disk, the changes of all callers gather; the next one takes them
together. A caller has its answer, and watchers see an event, only when it is committed.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from sqlalchemy import Connection, Executable
from sqlalchemy.exc import IntegrityError

from ....proto.errors import Exhausted, IsthmusError, Unavailable
from ....proto.jobs_pb2 import JobEvent
from .database import Contended, Database

log = logging.getLogger(__name__)

GROUP = 512  # changes in one transaction
CONTENDED_TRIES = 5
T = TypeVar("T")


class Tx:
    """One transaction; what a change does with it becomes true together with its neighbours' changes.

    `later` gathers new rows of all changes, which go to the database in one statement for each table: before anybody
    looks (`connection`), or at the end.
    """

    def __init__(self, connection: Connection, now_us: int) -> None:
        self.unflushed = connection  # does not see the rows of `later`
        self.now_us = now_us
        self.events: list[tuple[str, JobEvent]] = []  # (job, event), published once committed
        self.gathered: dict[Any, Any] = {}  # what changes of this transaction share, until `flush`
        self._later: dict[Any, list[dict[str, Any]]] = {}

    @property
    def connection(self) -> Connection:
        """Sees everything that this transaction has done."""
        self.flush()
        return self.unflushed

    def later(self, statement: Executable, rows: Iterable[dict[str, Any]]) -> None:
        """Executes a statement with these rows, and all others of the same statement, at the next `flush`."""
        self._later.setdefault(statement, []).extend(rows)

    def flush(self) -> None:
        """Executes what was gathered."""
        later, self._later = self._later, {}
        self.gathered.clear()
        for statement, rows in later.items():
            self.unflushed.execute(statement, rows)


Change = Callable[[Tx], Any]  # raises an IsthmusError only before it has written anything
OnCommit = Callable[[list[tuple[str, JobEvent]]], None]
_Asked = tuple[Change, "asyncio.Future[Any]"]
_Outcome = tuple["asyncio.Future[Any]", Any]


class Writer:
    """Belongs to the event loop that starts it. `stop` when nobody calls `run` any more."""

    def __init__(self, database: Database, on_commit: OnCommit) -> None:
        self._database = database
        self._on_commit = on_commit
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="jobs writer", daemon=True)
        self._stopped = False

    def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def run(self, change: Callable[[Tx], T]) -> T:
        """What `change` returns, once it is committed; what it raises, or Unavailable or Exhausted of the database.

        A caller that is cancelled meanwhile does not stop the change.
        """
        if self._stopped:
            raise Unavailable("the gateway is shutting down")
        future: asyncio.Future[T] = self._loop.create_future()
        self._asked.put((change, future))
        return await future

    async def stop(self) -> None:
        """Commits what was asked for, then ends the thread."""
        if self._thread.is_alive() and not self._stopped:
            self._stopped = True
            self._asked.put(None)
            await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while (first := self._asked.get()) is not None:
            group, last = [first], False
            while len(group) < GROUP and not last:
                try:
                    asked = self._asked.get_nowait()
                except queue.Empty:
                    break
                last = asked is None
                if asked is not None:
                    group.append(asked)
            try:
                self._commit(group)
            except Exception as error:  # the thread goes on: nobody else writes
                log.error("a bug in the writer of the database of jobs", exc_info=error)
                self._tell([(future, error) for _, future in group], [])
            if last:
                return

    def _commit(self, group: list[_Asked]) -> None:
        """One transaction for all; where it fails, one for each, so that nobody fails for a neighbour."""
        try:
            self._tell(*self._transaction(group))
            return
        except (Unavailable, Exhausted) as error:
            if len(group) == 1 or isinstance(error, Unavailable):
                self._tell([(future, error) for _, future in group], [])
                return
        except Exception as error:
            if len(group) == 1:
                self._alone(group[0], error)
                return
        for asked in group:
            self._commit([asked])

    def _alone(self, asked: _Asked, error: Exception) -> None:
        """A second try for a change that another process was quicker with (same idempotency key)."""
        if isinstance(error, IntegrityError):
            try:
                self._tell(*self._transaction([asked]))
                return
            except Exception as second:
                error = second
        if not isinstance(error, IsthmusError):
            log.error("a bug in a change of the database of jobs", exc_info=error)
        self._tell([(asked[1], error)], [])

    def _transaction(self, group: list[_Asked]) -> tuple[list[_Outcome], list[tuple[str, JobEvent]]]:
        for _ in range(CONTENDED_TRIES - 1):
            with contextlib.suppress(Contended):
                return self._once(group)
        return self._once(group)

    def _once(self, group: list[_Asked]) -> tuple[list[_Outcome], list[tuple[str, JobEvent]]]:
        with self._database.write() as connection:
            tx = Tx(connection, self._database.now_us(connection))
            outcomes: list[_Outcome] = []
            for change, future in group:
                try:
                    outcomes.append((future, change(tx)))
                except IsthmusError as error:
                    outcomes.append((future, error))
            tx.flush()
        return outcomes, tx.events

    def _tell(self, outcomes: list[_Outcome], events: list[tuple[str, JobEvent]]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, outcomes, events)

    def _deliver(self, outcomes: list[_Outcome], events: list[tuple[str, JobEvent]]) -> None:
        for future, outcome in outcomes:
            if future.done():  # cancelled
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        if events:
            self._on_commit(events)
