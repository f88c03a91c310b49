"""The workers of a cluster, each kept running under its name.

One task for each worker follows it: when its process dies it is started anew, at once as a rule and after growing
pauses where it ends again and again, and the fleet gets the new address.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ...proto.backoff import Restarts
from ...proto.errors import Exhausted, Incompatible, IsthmusError, NotFound, Unavailable
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import DrainResponse, ScaleResponse, WorkerRole
from ...worker.service import Drained
from ..fleet.registry import Fleet
from ..fleet.report import ROLE_OF, ROLES, Role
from .launcher import Launcher, RunningWorker
from .progress import SetActivity, with_activity

log = logging.getLogger(__name__)

RESTART_PAUSE_S, LAST_RESTART_PAUSE_S = 0.5, 60.0  # before a worker that ended is started anew
HEALTHY_S = 60.0  # a worker that was there for so long may end again without a longer pause
START_S = 120.0  # for a worker that is started to scale up
GONE_S = 10.0  # for a drain's answer beyond its own time


@dataclass(eq=False)
class _Worker:
    """A worker that is kept running."""

    running: RunningWorker
    role: Role  # that it shall have, after a restart too
    address: str = ""
    follower: asyncio.Task[None] | None = None
    down: bool = False  # it died and is not back
    starting: asyncio.Task[None] | None = None  # anew
    restarts: Restarts = field(default_factory=lambda: Restarts(RESTART_PAUSE_S, LAST_RESTART_PAUSE_S, HEALTHY_S))


class WorkerGroup:
    """Launches, follows, scales and drains workers: what the gateway's operations ask for (`WorkerManager`)."""

    may_be_empty = False

    def __init__(self, launcher: Launcher, fleet: Fleet, tasks: Tasks) -> None:
        """`fleet` gets every worker; `tasks` owns the followers."""
        self._launcher = launcher
        self._fleet = fleet
        self._tasks = tasks
        self._workers: list[_Worker] = []
        self._died = asyncio.Event()  # a worker, since this was cleared
        self.launcher_lost = False  # no worker can be started

    def wanted(self) -> dict[str, int]:
        """How many workers of each role there shall be."""
        return {role: sum(worker.role == role for worker in self._workers) for role in ROLES}

    @property
    def names(self) -> list[tuple[Role, str]]:
        """Role and name of each worker."""
        return [(worker.role, worker.running.name) for worker in self._workers]

    async def launch_all(self, names: Sequence[tuple[Role, str]]) -> None:
        """Starts workers side by side; raises the first error of any."""
        async with first_error(), asyncio.TaskGroup() as group:
            for role, name in names:
                group.create_task(self.launch(role, name))

    async def launch(self, role: Role, name: str, set_activity: SetActivity = lambda activity: None) -> None:
        """Starts a worker and follows it; returns when it serves."""
        worker = _Worker(await self._launcher.launch(role, name), role)
        self._workers.append(worker)
        worker.address = await with_activity(worker.running.address(), worker.running.activity, set_activity)
        worker.restarts.began(time.monotonic())
        self._fleet.add(worker.address)
        worker.follower = self._tasks.start("follow a worker", partial(self._follow, worker), about=name)

    async def drain(self, address: str, timeout_s: float) -> DrainResponse:
        """Drains a worker and ends it for good. Incompatible where it is the last one of its role."""
        worker = self._at(address)
        if sum(other.role == worker.role for other in self._workers) == 1:
            raise Incompatible(f"{worker.running.name} is the only {worker.role} worker; start another one first")
        drained = await self._end(worker, timeout_s)
        return DrainResponse(finished=drained.finished, handed_over=drained.handed_over)

    def set_role(self, address: str, role: WorkerRole.ValueType) -> None:
        """A worker has another role from now on, after a restart too."""
        self._at(address).role = ROLE_OF[role]

    async def scale(self, prefill: int | None, decode: int | None, timeout_s: float) -> ScaleResponse:
        """Starts the workers that are missing, then drains the newest of those that are too many."""
        if self.launcher_lost:
            raise Unavailable("Ray's head is gone: no worker can be started; restart `isthmus up` to scale")
        started: list[tuple[Role, str]] = []
        surplus: list[_Worker] = []
        names = {worker.running.name for worker in self._workers}
        wanted: list[tuple[Role, int | None]] = [("prefill", prefill), ("decode", decode)]
        for role, count in wanted:
            have = [worker for worker in self._workers if worker.role == role]
            missing = 0 if count is None else max(0, count - len(have))
            fresh = (name for number in itertools.count() if (name := f"{role}-{number}") not in names)
            for name in itertools.islice(fresh, missing):
                started.append((role, name))
            surplus += [] if count is None else have[count:]
        async with first_error(), asyncio.TaskGroup() as group:
            for role, name in started:
                group.create_task(self._add(role, name, timeout_s))
        await asyncio.gather(*(self._end(worker, timeout_s) for worker in surplus))
        drained = [worker.running.name for worker in surplus]
        return ScaleResponse(started=[name for _, name in started], drained=drained)

    async def drain_all(self, timeout_s: float) -> None:
        """Drains every worker; none is ended."""
        await asyncio.gather(*(worker.running.drain(timeout_s) for worker in self._workers), return_exceptions=True)

    async def abandon(self, drain: Callable[[str], Awaitable[object]]) -> None:
        """Drains all workers, by address, and forgets them: their processes end with the launcher."""
        for worker in self._workers:
            if worker.follower is not None:
                worker.follower.cancel()
        await asyncio.gather(*(drain(worker.address) for worker in self._workers), return_exceptions=True)
        for worker in self._workers:
            await self._fleet.remove(worker.address)
        await self.wait_starts()
        self._workers.clear()

    async def wait_down(self) -> None:
        """Returns while a worker has died and is not back."""
        while not any(worker.down for worker in self._workers):
            self._died.clear()
            await self._died.wait()

    async def wait_starts(self) -> None:
        """Waits for workers that are being started anew: what comes next would not know of them."""
        starting = [worker.starting for worker in self._workers if worker.starting is not None]
        if starting := [task for task in starting if not task.done()]:
            await asyncio.wait(starting, timeout=GONE_S)

    async def _add(self, role: Role, name: str, timeout_s: float) -> None:
        """Starts one more worker; Exhausted where it is not there in time, and then it is gone again."""
        try:
            async with asyncio.timeout(max(timeout_s, START_S)):
                await self.launch(role, name)
        except TimeoutError:
            await self._forget(name)
            raise Exhausted(f"{name} did not start in {max(timeout_s, START_S):g} s; is there room for it?") from None
        except OSError as error:  # of its process: an address or a file of its settings
            await self._forget(name)
            raise Unavailable(f"{name} did not start: {error}") from None
        except BaseException:
            await self._forget(name)
            raise

    async def _forget(self, name: str) -> None:
        for worker in [worker for worker in self._workers if worker.running.name == name]:
            self._workers.remove(worker)
            await worker.running.stop()

    async def _end(self, worker: _Worker, timeout_s: float) -> Drained:
        """Drains a worker, ends it and forgets it; one that is not there to be drained is ended all the same."""
        if worker not in self._workers:
            return Drained(0, 0)  # it was drained with its host meanwhile
        if worker.follower is not None:
            worker.follower.cancel()
        self._workers.remove(worker)
        try:
            async with asyncio.timeout(timeout_s + GONE_S):  # wait_for can swallow a cancellation
                return await worker.running.drain(timeout_s)
        except (IsthmusError, TimeoutError) as error:
            fields = {"worker": worker.running.name, "why": str(error)}
            log.warning("a worker was not drained", extra={"fields": fields})
            return Drained(0, 0)
        finally:
            await self._fleet.remove(worker.address)
            await worker.running.stop()

    def _at(self, address: str) -> _Worker:
        found = next((worker for worker in self._workers if worker.address == address), None)
        if found is None:
            raise NotFound(f"no worker at {address} is kept here any more")
        return found

    async def _follow(self, worker: _Worker) -> None:
        """Keeps the address of a worker in the fleet up to date, until the worker is gone for good."""
        while True:
            fields = {"worker": worker.running.name, "address": worker.address}
            if not worker.down:  # else an earlier try to have it back ended in an exception
                drained = await worker.running.wait_closed()
                if drained and self._launcher.one_host:
                    return await self._leave(worker, fields)
                log.warning("a worker %s", "was drained on its host" if drained else "died", extra={"fields": fields})
                worker.restarts.ended(time.monotonic())
                self._fleet.away_reasons[worker.address] = lambda: worker.restarts.reason(time.monotonic())
                worker.down = True
                self._died.set()
            address = await self._back(worker)
            if address is None:
                return
            worker.down = False
            worker.restarts.began(time.monotonic())
            self._fleet.away_reasons.pop(worker.address, None)
            if address != worker.address:
                self._fleet.add(address)
                await self._fleet.remove(worker.address)
                worker.address = address
            log.warning("a worker is back", extra={"fields": {**fields, "address": address}})

    async def _leave(self, worker: _Worker, fields: dict[str, str]) -> None:
        """Forgets a worker that was drained for good by an order that came past this process."""
        log.warning("a worker was drained on this host; `isthmus scale` starts another one", extra={"fields": fields})
        self._workers.remove(worker)
        await worker.running.stop()
        await self._fleet.remove(worker.address)

    async def _back(self, worker: _Worker) -> str | None:
        """The new address of a worker that died, once it is started anew; None where nothing can be started."""
        with contextlib.suppress(IsthmusError, OSError):
            return await worker.running.address()  # it was only out of reach
        while not self.launcher_lost:
            await asyncio.sleep(worker.restarts.next_s - time.monotonic())
            try:
                name = f"start {worker.running.name} anew"
                worker.starting = asyncio.create_task(self._start_anew(worker), name=name)
                await asyncio.shield(worker.starting)  # a start that has begun is not ended by who waits for it
                return await worker.running.address()
            except (IsthmusError, OSError) as error:
                worker.restarts.ended(time.monotonic())
                fields = {"worker": worker.running.name, "why": str(error), "ends": worker.restarts.ends}
                log.error("a worker could not be started anew", extra={"fields": fields})
        return None

    async def _start_anew(self, worker: _Worker) -> None:
        with contextlib.suppress(IsthmusError, OSError, TimeoutError):
            async with asyncio.timeout(GONE_S):
                await worker.running.stop()  # whatever is left of it
        worker.running = await self._launcher.launch(worker.role, worker.running.name)
        if worker not in self._workers:  # it was drained, or all are started anew
            await worker.running.stop()


@contextlib.asynccontextmanager
async def first_error() -> AsyncIterator[None]:
    """Raises one error out of a task group's, not the group."""
    try:
        yield
    except ExceptionGroup as group:
        error = group.exceptions[0]
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise error from None
