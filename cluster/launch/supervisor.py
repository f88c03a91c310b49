"""A whole cluster in one place: the gateway in this process, workers wherever the launcher puts them.

Start: the launcher (Ray) and the gateway's tokenizer side by side, then all workers side by side (`worker_group.py`).
Where the launcher itself is lost (Ray's head died), the workers go on; once one of them is lost too, everything but the
gateway is started anew. Stop: no new requests, the running ones end, then the workers, then the launcher.
"""

import asyncio
import contextlib
import logging

from ...proto.errors import IsthmusError, Unavailable
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import WORKER_HEALTH_INCOMPATIBLE, WORKER_HEALTH_UNFIT
from ..config import ClusterConfig
from ..fleet.report import Role
from ..frontend.gateway import Gateway
from ..text.served import ServedModel, load_served_model
from .launcher import Launcher
from .progress import ProgressStep, no_progress
from .worker_group import WorkerGroup, first_error

log = logging.getLogger(__name__)

REBUILD_DRAIN_S = 5.0  # for requests on the workers that are left, before all are started anew
REBUILD_PAUSE_S = 5.0  # before another try
UNUSABLE = (WORKER_HEALTH_INCOMPATIBLE, WORKER_HEALTH_UNFIT)


class Supervisor:
    """Starts, guards and stops a cluster. Call `stop` whatever happened in `start`."""

    def __init__(self, config: ClusterConfig, launcher: Launcher, step: ProgressStep = no_progress) -> None:
        self._config = config
        self._launcher = launcher
        self._step = step
        self._tasks = Tasks()
        self.gateway: Gateway | None = None
        self.workers: WorkerGroup | None = None

    async def start(self) -> Gateway:
        """Returns when a request would be served by every worker. Raises the first error of any part."""
        async with first_error(), asyncio.TaskGroup() as group:
            starting = group.create_task(self._start_gateway())
            group.create_task(self._start_launcher())
        gateway = starting.result()
        self.workers = workers = WorkerGroup(self._launcher, gateway.fleet, self._tasks)
        roles: list[tuple[Role, str]] = [
            *(("prefill", f"prefill-{number}") for number in range(self._config.prefill)),
            *(("decode", f"decode-{number}") for number in range(self._config.decode)),
        ]
        async with first_error(), asyncio.TaskGroup() as group:
            for role, name in roles:
                group.create_task(self._start_worker(workers, role, name))
        await self._all_usable(gateway)
        gateway.operations.manager = workers
        self._tasks.start("guard the launcher", lambda: self._guard_launcher(gateway, workers))
        return gateway

    async def stop(self, drain_s: float) -> None:
        """Drains for at most `drain_s`, then ends everything."""
        await self._tasks.stop()
        if self.workers is not None:
            await self.workers.wait_starts()
        if self.gateway is not None:
            await self.gateway.drain(drain_s)
            await self.gateway.stop()
        if self.workers is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(drain_s, 5.0)):  # nothing runs there any more
                    await self.workers.drain_all(drain_s)
        await self._launcher.close()

    async def _start_gateway(self) -> Gateway:
        with self._step(f"model {self._config.model}"):
            config = self._config
            model: ServedModel = await asyncio.to_thread(
                load_served_model, config.model, config.model_manifest, config.gateway.chat_template
            )
            self.gateway = Gateway(
                *(config.listen, model),
                config=config.gateway,
                owner=self._tasks,
                cluster_id=config.cluster_id,
                log_content=config.log_content,
                security=await asyncio.to_thread(config.security, "gateway", "supervisor"),
            )
            await self.gateway.start()
            return self.gateway

    async def _start_launcher(self) -> None:
        with self._step("ray"):
            await self._launcher.start()

    async def _start_worker(self, workers: WorkerGroup, role: Role, name: str) -> None:
        with self._step(name) as set_activity:
            await workers.launch(role, name, set_activity)

    async def _guard_launcher(self, gateway: Gateway, workers: WorkerGroup) -> None:
        """Starts all but the gateway anew where the launcher is lost and then a worker; until cancelled."""
        while True:
            await self._launcher.lost()
            workers.launcher_lost = True
            log.error("Ray's head is gone: the workers go on; once one of them dies too, all are started anew")
            await workers.wait_down()
            names = workers.names
            while not await self._rebuild(gateway, workers, names):
                await asyncio.sleep(REBUILD_PAUSE_S)
            workers.launcher_lost = False
            log.warning("all workers were started anew")

    async def _rebuild(self, gateway: Gateway, workers: WorkerGroup, names: list[tuple[Role, str]]) -> bool:
        """Starts the launcher and these workers anew; whether that went well.

        Requests wait for them in the gateway, those too that the workers still have after REBUILD_DRAIN_S.
        """
        await workers.abandon(lambda address: gateway.operations.drain_at(address, REBUILD_DRAIN_S))
        try:
            await self._launcher.close()
            await self._launcher.start()
            await workers.launch_all(names)
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
            change, table = gateway.fleet.change, gateway.fleet.table.routing
            if len(table.prefill) == self._config.prefill and len(table.decode) == self._config.decode:
                return
            bad = [status for status in gateway.fleet.statuses() if status.health in UNUSABLE]
            if bad:
                raise Unavailable(f"worker {bad[0].worker_id} {bad[0].reason}")
            await change.wait()
