"""A whole cluster in one place: the gateway in this process, workers wherever the launcher puts them.

Start: the launcher (Ray) and the gateway's tokenizer side by side, then all workers side by side. After
that one task for each worker follows it: when its process dies and comes back elsewhere, the gateway is
told the new address. Stop: no new requests, the running ones end, then the workers, then the launcher.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Protocol

from ..proto.errors import IsthmusError, Unavailable
from ..proto.worker_pb2 import WORKER_HEALTH_INCOMPATIBLE
from .config import ClusterConfig, Role
from .gateway import Gateway
from .host import Restarting
from .served import ServedModel, load_served_model
from .steps import Step

log = logging.getLogger(__name__)

RESTART_PAUSE_S = 0.5


class RunningWorker(Protocol):
    """A worker somewhere, under a name that outlives its process."""

    name: str

    async def address(self) -> str: ...
    async def wait_closed(self) -> None: ...
    async def drain(self, timeout_s: float) -> None: ...
    async def stop(self) -> None: ...


class Launcher(Protocol):
    """Where workers come from."""

    async def start(self) -> None: ...
    async def launch(self, role: Role, name: str) -> RunningWorker: ...
    async def close(self) -> None: ...


class Supervisor:
    """Starts, follows and stops a cluster. Call `stop` whatever happened in `start`."""

    def __init__(self, config: ClusterConfig, launcher: Launcher, step: Step = nullcontext) -> None:
        self._config = config
        self._launcher = launcher
        self._step = step
        self._workers: list[RunningWorker] = []
        self._followers: list[asyncio.Task[None]] = []
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
        return self.gateway

    async def stop(self, drain_s: float) -> None:
        """Drains for at most `drain_s`, then ends everything."""
        for follower in self._followers:
            follower.cancel()
        if self.gateway is not None:
            await self.gateway.drain(drain_s)
            await self.gateway.stop()
        drains = [asyncio.create_task(worker.drain(drain_s)) for worker in self._workers]
        if drains:
            await asyncio.wait(drains, timeout=min(drain_s, 5.0))  # nothing runs there any more
        await self._launcher.close()

    async def _start_gateway(self) -> Gateway:
        with self._step(f"model {self._config.model}"):
            model: ServedModel = await asyncio.to_thread(load_served_model, self._config.model)
            self.gateway = Gateway(f"{self._config.host}:{self._config.port}", model, config=self._config.gateway)
            await self.gateway.start()
            return self.gateway

    async def _start_launcher(self) -> None:
        with self._step("ray"):
            await self._launcher.start()

    async def _start_worker(self, role: Role, name: str) -> None:
        with self._step(name):
            worker = await self._launcher.launch(role, name)
            self._workers.append(worker)
            address = await worker.address()
        assert self.gateway is not None
        self.gateway.fleet.add(address)
        self._followers.append(asyncio.create_task(self._follow(worker, address), name=f"follow {name}"))

    async def _follow(self, worker: RunningWorker, address: str) -> None:
        """Keeps the gateway told of where a worker is, until it is gone for good."""
        assert self.gateway is not None
        while True:
            await worker.wait_closed()
            log.warning("a worker died", extra={"fields": {"worker": worker.name, "address": address}})
            fresh = await self._back(worker)
            if fresh is None:
                return
            if fresh != address:
                self.gateway.fleet.add(fresh)
                await self.gateway.fleet.remove(address)
                address = fresh
            log.warning("a worker is back", extra={"fields": {"worker": worker.name, "address": address}})

    async def _back(self, worker: RunningWorker) -> str | None:
        """The new address of a worker that died; None where it does not come back."""
        while True:
            await asyncio.sleep(RESTART_PAUSE_S)
            try:
                return await worker.address()
            except Restarting:
                continue
            except (IsthmusError, OSError) as error:
                log.error("a worker is lost", extra={"fields": {"worker": worker.name, "why": str(error)}})
                return None

    async def _all_usable(self, gateway: Gateway) -> None:
        """Waits for the first report of every worker; Unavailable where some cannot be paired."""
        while True:
            change = gateway.fleet.change
            snapshot = gateway.fleet.snapshot()
            if len(snapshot.prefill) == self._config.prefill and len(snapshot.decode) == self._config.decode:
                return
            bad = [status for status in gateway.fleet.statuses() if status.health == WORKER_HEALTH_INCOMPATIBLE]
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
