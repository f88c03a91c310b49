"""A whole cluster in one place: the gateway in this process, workers wherever the launcher puts them.

Start: the launcher (Ray) and the gateway's tokenizer side by side, then all workers side by side. After
that one task for each worker follows it: when its process dies it is started anew, at once as a rule and after
growing pauses where it ends again and again, and the gateway is told the new address. Where the launcher itself is
lost (Ray's head died), the workers go on; once one of them is lost too, everything but the gateway is started anew.
Stop: no new requests, the running ones end, then the workers, then the launcher.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ...proto.backoff import Lives
from ...proto.errors import Exhausted, Incompatible, IsthmusError, NotFound, Unavailable
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import (
    WORKER_HEALTH_INCOMPATIBLE,
    WORKER_HEALTH_UNFIT,
    DrainResponse,
    ScaleResponse,
    WorkerRole,
)
from ...worker.service import Drained
from ..config import ClusterConfig, Role
from ..frontend.gateway import Gateway
from ..text.served import ServedModel, load_served_model
from .seat import ROLE_OF
from .steps import Step, Tell, telling, unseen

log = logging.getLogger(__name__)

RESTART_PAUSE_S, LAST_RESTART_PAUSE_S = 0.5, 60.0  # before a worker that ended is started anew
HEALTHY_S = 60.0  # a worker that was there for so long may end again without a longer pause
REBUILD_DRAIN_S = (
    5.0  # for requests on the workers that are left, when all are started anew; then they are placed again
)
REBUILD_PAUSE_S = 5.0  # before another try
START_S = 120.0  # for a worker that is started to scale up
GONE_S = 10.0  # for a drain's answer beyond its own time
UNUSABLE = (WORKER_HEALTH_INCOMPATIBLE, WORKER_HEALTH_UNFIT)


class RunningWorker(Protocol):
    """A worker somewhere, under a name that outlives its process."""

    name: str

    async def address(self) -> str: ...
    async def activity(self) -> str: ...  # what its start is at
    async def wait_closed(self) -> None: ...
    async def drain(self, timeout_s: float) -> Drained: ...
    async def stop(self) -> None: ...


class Launcher(Protocol):
    """Where workers come from."""

    async def start(self) -> None: ...
    async def launch(self, role: Role, name: str) -> RunningWorker: ...
    async def lost(self) -> None: ...  # returns once it can start and restart nothing any more
    async def close(self) -> None: ...


@dataclass(eq=False)
class _Kept:
    """A worker that is kept running."""

    worker: RunningWorker
    role: Role  # that it shall have, after a restart too
    address: str = ""
    follower: asyncio.Task[None] | None = None
    down: bool = False  # it died and is not back
    starting: asyncio.Task[None] | None = None  # anew
    lives: Lives = field(default_factory=lambda: Lives(RESTART_PAUSE_S, LAST_RESTART_PAUSE_S, HEALTHY_S))


class Supervisor:
    """Starts, follows, scales and stops a cluster. Call `stop` whatever happened in `start`."""

    def __init__(self, config: ClusterConfig, launcher: Launcher, step: Step = unseen) -> None:
        self._config = config
        self._launcher = launcher
        self._step = step
        self._kept: list[_Kept] = []
        self._headless = False  # the launcher is lost
        self._died = asyncio.Event()  # a worker, since then
        self._tasks = Tasks()
        self.gateway: Gateway | None = None

    async def start(self) -> Gateway:
        """Returns when a request would be served by every worker. Raises the first error of any part."""
        async with _first_error(), asyncio.TaskGroup() as group:
            gateway = group.create_task(self._start_gateway())
            group.create_task(self._start_launcher())
        self.gateway = gateway.result()
        roles: list[tuple[Role, str]] = [
            *(("prefill", f"prefill-{number}") for number in range(self._config.prefill)),
            *(("decode", f"decode-{number}") for number in range(self._config.decode)),
        ]
        async with _first_error(), asyncio.TaskGroup() as group:
            for role, name in roles:
                group.create_task(self._start_worker(role, name))
        await self._all_usable(self.gateway)
        self.gateway.operations.keeper = self
        self._tasks.start("guard the launcher", self._guard_launcher)
        return self.gateway

    async def stop(self, drain_s: float) -> None:
        """Drains for at most `drain_s`, then ends everything."""
        await self._tasks.stop()
        await self._starts_ended()
        if self.gateway is not None:
            await self.gateway.drain(drain_s)
            await self.gateway.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(drain_s, 5.0)):  # nothing runs there any more
                await asyncio.gather(*(kept.worker.drain(drain_s) for kept in self._kept), return_exceptions=True)
        await self._launcher.close()

    async def _start_gateway(self) -> Gateway:
        with self._step(f"model {self._config.model}"):
            model: ServedModel = await asyncio.to_thread(load_served_model, self._config.model)
            config = self._config
            self.gateway = Gateway(
                config.listen, model, config=config.gateway, owner=self._tasks, cluster_id=config.cluster_id
            )
            await self.gateway.start()
            return self.gateway

    async def _start_launcher(self) -> None:
        with self._step("ray"):
            await self._launcher.start()

    async def _start_worker(self, role: Role, name: str) -> None:
        with self._step(name) as tell:
            await self._launch(role, name, tell)

    async def _launch(self, role: Role, name: str, tell: Tell = lambda doing: None) -> None:
        kept = _Kept(await self._launcher.launch(role, name), role)
        self._kept.append(kept)
        kept.address = await telling(kept.worker.address(), kept.worker.activity, tell)
        assert self.gateway is not None
        kept.lives.began(time.monotonic())
        self.gateway.fleet.add(kept.address)
        kept.follower = self._tasks.start("follow a worker", partial(self._follow, kept), about=name)

    # What the gateway's operations ask for (`operations.Keeper`).

    async def drain(self, address: str, timeout_s: float) -> DrainResponse:
        """Drains a worker and ends it for good. Incompatible where it is the last one of its role."""
        kept = self._at(address)
        if sum(other.role == kept.role for other in self._kept) == 1:
            raise Incompatible(f"{kept.worker.name} is the only {kept.role} worker; start another one first")
        drained = await self._end(kept, timeout_s)
        return DrainResponse(finished=drained.finished, handed_over=drained.handed_over)

    def flipped(self, address: str, role: WorkerRole.ValueType) -> None:
        """Notes the role that a worker shall have from now on."""
        self._at(address).role = ROLE_OF[role]

    async def scale(self, prefill: int | None, decode: int | None, timeout_s: float) -> ScaleResponse:
        """Starts the workers that are missing, then drains the newest of those that are too many."""
        if self._headless:
            raise Unavailable("Ray's head is gone: no worker can be started; restart `isthmus up` to scale")
        started: list[tuple[Role, str]] = []
        surplus: list[_Kept] = []
        names = {kept.worker.name for kept in self._kept}
        wanted: list[tuple[Role, int | None]] = [("prefill", prefill), ("decode", decode)]
        for role, count in wanted:
            have = [kept for kept in self._kept if kept.role == role]
            missing = 0 if count is None else max(0, count - len(have))
            fresh = (name for number in itertools.count() if (name := f"{role}-{number}") not in names)
            for name in itertools.islice(fresh, missing):
                started.append((role, name))
            surplus += [] if count is None else have[count:]
        async with _first_error(), asyncio.TaskGroup() as group:
            for role, name in started:
                group.create_task(self._add(role, name, timeout_s))
        await asyncio.gather(*(self._end(kept, timeout_s) for kept in surplus))
        return ScaleResponse(started=[name for _, name in started], drained=[kept.worker.name for kept in surplus])

    async def _add(self, role: Role, name: str, timeout_s: float) -> None:
        """Starts one more worker; Exhausted where it is not there in time, and then it is gone again."""
        try:
            async with asyncio.timeout(max(timeout_s, START_S)):
                await self._launch(role, name)
        except TimeoutError:
            await self._forget(name)
            raise Exhausted(f"{name} did not start in {max(timeout_s, START_S):g} s; is there room for it?") from None
        except BaseException:
            await self._forget(name)
            raise

    async def _forget(self, name: str) -> None:
        for kept in [kept for kept in self._kept if kept.worker.name == name]:
            self._kept.remove(kept)
            await kept.worker.stop()

    async def _end(self, kept: _Kept, timeout_s: float) -> Drained:
        """Drains a worker, ends it and forgets it; one that is not there to be drained is ended all the same."""
        assert self.gateway is not None
        if kept.follower is not None:
            kept.follower.cancel()
        self._kept.remove(kept)
        try:
            async with asyncio.timeout(timeout_s + GONE_S):  # wait_for can swallow a cancellation
                return await kept.worker.drain(timeout_s)
        except (IsthmusError, TimeoutError) as error:
            log.warning("a worker was not drained", extra={"fields": {"worker": kept.worker.name, "why": str(error)}})
            return Drained(0, 0)
        finally:
            await self.gateway.fleet.remove(kept.address)
            await kept.worker.stop()

    def _at(self, address: str) -> _Kept:
        found = next((kept for kept in self._kept if kept.address == address), None)
        if found is None:
            raise NotFound(f"no worker at {address} is kept here any more")
        return found

    async def _follow(self, kept: _Kept) -> None:
        """Keeps the gateway told of where a worker is, until it is gone for good."""
        assert self.gateway is not None
        while True:
            fields = {"worker": kept.worker.name, "address": kept.address}
            if not kept.down:  # else an earlier try to have it back ended in an exception
                await kept.worker.wait_closed()
                log.warning("a worker died", extra={"fields": fields})
                kept.lives.ended(time.monotonic())
                self.gateway.fleet.notes[kept.address] = lambda: kept.lives.reason(time.monotonic())
                kept.down = True
                self._died.set()
            fresh = await self._back(kept)
            if fresh is None:
                return
            kept.down = False
            kept.lives.began(time.monotonic())
            self.gateway.fleet.notes.pop(kept.address, None)
            if fresh != kept.address:
                self.gateway.fleet.add(fresh)
                await self.gateway.fleet.remove(kept.address)
                kept.address = fresh
            log.warning("a worker is back", extra={"fields": {**fields, "address": fresh}})

    async def _back(self, kept: _Kept) -> str | None:
        """The new address of a worker that died, once it is started anew; None where nothing can be started."""
        with contextlib.suppress(IsthmusError, OSError):
            return await kept.worker.address()  # it was only out of reach
        while not self._headless:
            await asyncio.sleep(kept.lives.next_s - time.monotonic())
            try:
                kept.starting = asyncio.create_task(self._start_anew(kept), name=f"start {kept.worker.name} anew")
                await asyncio.shield(kept.starting)  # a start that has begun is not ended by who waits for it
                return await kept.worker.address()
            except (IsthmusError, OSError) as error:
                kept.lives.ended(time.monotonic())
                fields = {"worker": kept.worker.name, "why": str(error), "ends": kept.lives.ends}
                log.error("a worker could not be started anew", extra={"fields": fields})
        return None

    async def _starts_ended(self) -> None:
        """Waits for workers that are being started anew: what comes next would not know of them."""
        if starting := [kept.starting for kept in self._kept if kept.starting is not None and not kept.starting.done()]:
            await asyncio.wait(starting, timeout=GONE_S)

    async def _start_anew(self, kept: _Kept) -> None:
        with contextlib.suppress(IsthmusError, OSError, TimeoutError):
            async with asyncio.timeout(GONE_S):
                await kept.worker.stop()  # whatever is left of it
        kept.worker = await self._launcher.launch(kept.role, kept.worker.name)
        if kept not in self._kept:  # it was drained, or all are started anew
            await kept.worker.stop()

    async def _guard_launcher(self) -> None:
        """Builds everything but the gateway anew where the launcher is lost and then a worker; until cancelled."""
        while True:
            await self._launcher.lost()
            self._headless = True
            log.error("Ray's head is gone: the workers go on; once one of them dies too, all are started anew")
            while not any(kept.down for kept in self._kept):
                self._died.clear()
                await self._died.wait()
            wanted: list[tuple[Role, str]] = [(kept.role, kept.worker.name) for kept in self._kept]
            while not await self._rebuild(wanted):
                await asyncio.sleep(REBUILD_PAUSE_S)
            self._headless = False
            log.warning("all workers were started anew")

    async def _rebuild(self, wanted: Sequence[tuple[Role, str]]) -> bool:
        """Starts the launcher and these workers anew; whether that went well.

        Requests wait for them in the gateway, those too that the workers still have after REBUILD_DRAIN_S.
        """
        assert self.gateway is not None
        fleet, operations = self.gateway.fleet, self.gateway.operations
        for kept in self._kept:
            if kept.follower is not None:
                kept.follower.cancel()
        drains = (operations.drain_at(kept.address, REBUILD_DRAIN_S) for kept in self._kept)
        await asyncio.gather(*drains, return_exceptions=True)
        for kept in self._kept:
            await fleet.remove(kept.address)
        await self._starts_ended()
        self._kept.clear()
        try:
            await self._launcher.close()
            await self._launcher.start()
            async with _first_error(), asyncio.TaskGroup() as group:
                for role, name in wanted:
                    group.create_task(self._launch(role, name))
        except (IsthmusError, OSError) as error:
            log.error("the workers could not be started anew", extra={"fields": {"why": str(error)}})
            return False
        except Exception as error:  # a bug: what shall run is known to the caller alone, who tries again
            self._tasks.note("guard the launcher", error)
            return False
        return True

    async def _all_usable(self, gateway: Gateway) -> None:
        """Waits for the first report of every worker; Unavailable where some cannot be paired."""
        while True:
            change = gateway.fleet.change
            snapshot = gateway.fleet.snapshot()
            if len(snapshot.prefill) == self._config.prefill and len(snapshot.decode) == self._config.decode:
                return
            bad = [status for status in gateway.fleet.statuses() if status.health in UNUSABLE]
            if bad:
                raise Unavailable(f"worker {bad[0].worker_id} {bad[0].reason}")
            await change.wait()


@contextlib.asynccontextmanager
async def _first_error() -> AsyncIterator[None]:
    """Raises one error out of a task group's, not the group."""
    try:
        yield
    except ExceptionGroup as group:
        error = group.exceptions[0]
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise error from None
