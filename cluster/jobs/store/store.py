"""The jobs of a gateway as they are kept: every method of it returns once the database has done it."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from sqlalchemy import Connection

from ....proto.errors import IsthmusError
from ....proto.jobs_pb2 import Job, JobError, JobEvent, JobOutput, JobResult
from ..database.database import READERS, Database
from ..database.migrate import migrate
from ..database.writer import Tx, Writer
from ..settings import JobsSettings
from . import leases, progress, prune, queries
from .event_bus import EventBus
from .submit import NewJob, submit

T = TypeVar("T")


class JobStore:
    """Belongs to one event loop. All methods raise Unavailable or Exhausted where the database fails."""

    def __init__(self, database: Database, settings: JobsSettings) -> None:
        self._database = database
        self._settings = settings
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="jobs reader")
        self.bus = EventBus()
        self._writer = Writer(database, self.bus.publish)

    @classmethod
    async def open(cls, url: str, settings: JobsSettings) -> Self:
        """Connects, brings the schema up to date and starts the writer. Incompatible for a newer schema."""
        database = Database(url)
        try:
            await asyncio.to_thread(migrate, database)
        except BaseException as error:
            database.close()
            if isinstance(error, IsthmusError) and error.private:  # for whoever starts the gateway
                raise type(error)(f"{error} ({error.private})") from error
            raise
        store = cls(database, settings)
        store._writer.start()
        return store

    async def close(self) -> None:
        """Commits what was asked for and closes all connections."""
        await self._writer.stop()
        await asyncio.to_thread(self._readers.shutdown)
        self._database.close()

    async def submit(self, new: NewJob) -> Job:
        """See `submit.submit`."""
        return await self._writer.run(lambda tx: submit(tx, new, self._settings))

    async def record(self, owner: str, made: Sequence[progress.Progress]) -> frozenset[str]:
        """See `progress.record`."""
        return await self._writer.run(lambda tx: progress.record(tx, owner, made))

    async def fail(self, job_id: str, owner: str, error: JobError) -> None:
        """See `progress.fail`."""
        await self._writer.run(lambda tx: progress.fail(tx, job_id, owner, error))

    async def cancel(self, job_id: str, tenant: str | None = None) -> Job:
        """See `progress.cancel`."""
        return await self._writer.run(lambda tx: progress.cancel(tx, job_id, tenant))

    async def forget(self, job_id: str, tenant: str | None = None) -> None:
        """See `prune.forget`."""
        await self._writer.run(lambda tx: prune.forget(tx, job_id, tenant))

    async def erase(self) -> bool:
        """See `prune.erase`."""
        return await self._writer.run(prune.erase)

    async def join(self, gateway: str, address: str) -> None:
        """See `leases.join`."""
        await self._writer.run(lambda tx: leases.join(tx, gateway, address, self._lease_us))

    async def leave(self, gateway: str) -> None:
        """See `leases.leave`."""
        await self._writer.run(lambda tx: leases.leave(tx, gateway))

    async def renew(self, gateway: str) -> bool:
        """Renews the lease, if it is still there; ends those of dead gateways, and jobs past their deadline."""

        def change(tx: Tx) -> bool:
            kept = leases.renew(tx, gateway, self._lease_us)
            leases.end_expired(tx)
            progress.expire(tx)
            return kept

        return await self._writer.run(change)

    async def claim(
        self, gateway: str, fingerprint: str, priorities: Sequence[int], limit: int, but: Sequence[str] = ()
    ) -> list[leases.Claimed]:
        """See `leases.claim`."""
        return await self._writer.run(lambda tx: leases.claim(tx, gateway, fingerprint, priorities, limit, but))

    async def job(self, job_id: str, tenant: str | None = None) -> Job:
        """See `queries.get_job`."""
        return await self._read(lambda connection: queries.get_job(connection, job_id, tenant))

    async def jobs(self, wanted: queries.Listing) -> tuple[list[Job], str]:
        """See `queries.list_jobs`."""
        return await self._read(lambda connection: queries.list_jobs(connection, wanted))

    async def events(self, job_id: str, first: int, tenant: str | None = None) -> tuple[Job, list[JobEvent]]:
        """See `queries.get_events`."""
        return await self._read(lambda connection: queries.get_events(connection, job_id, first, tenant))

    async def results(
        self, job_id: str, limit: int, page_token: str, tenant: str | None = None
    ) -> tuple[Job, list[JobResult], str]:
        """See `queries.get_results`."""
        return await self._read(lambda connection: queries.get_results(connection, job_id, limit, page_token, tenant))

    async def last_events(self, job_ids: Iterable[str]) -> dict[str, int]:
        """See `queries.last_events`."""
        return await self._read(lambda connection: queries.last_events(connection, job_ids))

    async def owned(self, gateway: str) -> set[str]:
        """See `queries.owned_jobs`."""
        return await self._read(lambda connection: queries.owned_jobs(connection, gateway))

    async def waiting(self, job_id: str, after: int, limit: int) -> Sequence[Any]:
        """See `queries.waiting_requests`."""
        return await self._read(lambda connection: queries.waiting_requests(connection, job_id, after, limit))

    async def outputs(self, job_id: str, item: int) -> list[JobOutput]:
        """See `queries.outputs_of`."""
        return await self._read(lambda connection: queries.outputs_of(connection, job_id, item))

    @property
    def _lease_us(self) -> int:
        return round(self._settings.lease_s * 1e6)

    async def _read(self, query: Callable[[Connection], T]) -> T:
        def run() -> T:
            with self._database.read() as connection:
                return query(connection)

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)
