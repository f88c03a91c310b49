"""The workers of a gateway that has a supervisor: its list is followed, and kept while it is away.

A worker that is on the list no more is forgotten once it gives no sign of life: a supervisor that has lost sight of a
worker ends no answer.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Collection

import grpc.aio

from ...proto.backoff import backoff_s
from ...proto.rpc.transport import Transport
from ...proto.supervisor_pb2 import ListedWorker, WatchWorkersRequest, WorkerList
from ...proto.supervisor_pb2_grpc import SupervisorStub
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import WORKER_HEALTH_STARTING, ClusterStatus, WorkerReport
from .registry import Fleet
from .report import NUMBER_OF, Role
from .shortage import Shortage

FIRST_RETRY_S, LAST_RETRY_S = 0.2, 2.0
SILENT_S = 15.0  # without a list: the stream is opened anew
LOOK_S = 0.25  # between two looks for workers to forget, and for shortage that has ended


def fill_listed(status: ClusterStatus, listed: Collection[ListedWorker]) -> None:
    """Says how many workers a list has, and which of them have no address."""
    for role, number in NUMBER_OF.items():
        status.wanted[role] = sum(one.role == number for one in listed)
    status.workers.extend(
        WorkerReport(worker_id=one.name, role=one.role, health=WORKER_HEALTH_STARTING, reason=one.reason)
        for one in listed
        if not one.address
    )


class SupervisedWorkers:
    """Feeds a fleet from a supervisor's list. `stop` ends it."""

    def __init__(self, address: str, fleet: Fleet, transport: Transport, shortage: Shortage, gateway: str) -> None:
        self.address, self._gateway = address, gateway
        self._fleet, self._shortage = fleet, shortage
        self._channel = transport.dial(address, "supervisor")
        self._listed: dict[str, ListedWorker] | None = None  # by name; None: no list came yet
        self._tasks = Tasks(fleet.tasks.failures)
        self._away_s: float | None = time.monotonic()  # since when no list comes
        self._problem = "no list came yet"

    def start(self) -> None:
        """Begins to follow; returns at once."""
        self._tasks.start("follow the supervisor", self._keep_following)
        self._tasks.start("forget workers that left", self._keep_forgetting)

    async def stop(self) -> None:
        """Forgets the supervisor; the fleet stays."""
        await self._tasks.stop()
        await self._channel.close()

    @property
    def failing(self) -> list[str]:
        """Of its tasks, those that fail again and again."""
        return self._tasks.failing

    def status(self) -> str:
        """Where the supervisor is, and for how long it has been away."""
        if self._away_s is None:
            return self.address
        return f"{self.address}, away for {time.monotonic() - self._away_s:.0f} s ({self._problem})"

    def fill_status(self, status: ClusterStatus) -> None:
        """Says where the supervisor is, and what its last list has."""
        status.supervisor = self.status()
        if self._listed is not None:
            fill_listed(status, self._listed.values())

    async def _keep_following(self) -> None:
        tries = 0
        while True:
            heard = False
            try:
                async with contextlib.aclosing(self._lists()) as lists:
                    async for workers in lists:
                        heard, self._away_s, tries = True, None, 0
                        self._take(workers)
                self._problem = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                self._problem = " ".join(f"{error.code().name}: {error.details() or ''}".split())
            except TimeoutError:
                self._problem = f"no list for {SILENT_S:g} s"
            else:
                if heard:
                    continue  # it is asked anew because other requests wait
            if self._away_s is None:
                self._away_s = time.monotonic()
            tries += 1
            await asyncio.sleep(backoff_s(tries, FIRST_RETRY_S, LAST_RETRY_S))

    async def _lists(self) -> AsyncGenerator[WorkerList]:
        """The lists of one call, until what requests wait for here is something else."""
        roles = self._shortage.roles()
        request = WatchWorkersRequest(gateway=self._gateway, waiting_for=[NUMBER_OF[role] for role in sorted(roles)])
        call = SupervisorStub(self._channel).WatchWorkers(request)
        changed = asyncio.create_task(self._other_demand(roles))
        try:
            while True:
                reading = asyncio.ensure_future(call.read())
                done, _ = await asyncio.wait({reading, changed}, timeout=SILENT_S, return_when=asyncio.FIRST_COMPLETED)
                if reading not in done:
                    reading.cancel()
                    if not done:
                        raise TimeoutError
                    return
                if not isinstance(workers := reading.result(), WorkerList):
                    return
                yield workers
        finally:
            changed.cancel()
            call.cancel()

    async def _other_demand(self, roles: frozenset[Role]) -> None:
        while self._shortage.roles() == roles:
            change = self._shortage.change
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await change.wait()

    def _take(self, workers: WorkerList) -> None:
        self._listed = {worker.name: worker for worker in workers.workers}
        self._fleet.table.gateways = max(1, workers.gateways)
        for worker in workers.workers:
            if worker.address:
                self._fleet.add(worker.address)

    async def _keep_forgetting(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            listed = {worker.address for worker in (self._listed or {}).values()}
            for address in self._fleet.table.addresses:
                if address not in listed and self._fleet.table.is_lost(address):
                    await self._fleet.remove(address)
