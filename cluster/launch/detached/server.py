"""The supervisor as a process apart from the gateways: it keeps the workers, takes orders, and tells gateways the list.

No request passes through it. Its end ends no worker; the next one adopts them (`worker_pool.py`).
"""

import asyncio
import logging
from typing import Protocol

from ....kvtransfer.frame import PROTOCOL_VERSION
from ....proto import supervisor_pb2, supervisor_pb2_grpc, worker_pb2, worker_pb2_grpc
from ....proto.errors import IllegalState, Unavailable
from ....proto.generation_pb2 import GenerateRequest
from ....proto.rpc.addresses import parse_address
from ....proto.rpc.health import HealthServicer
from ....proto.rpc.server import Server
from ....proto.rpc.transport import Transport
from ....proto.security.state import forget_port, note_port
from ....proto.tasks import Tasks
from ....proto.worker_pb2 import Explanation
from ...config import ClusterConfig
from ...fleet.compatibility import Requirements
from ...fleet.registry import Fleet
from ...frontend.admin import CLUSTER, listen_admin
from ...frontend.cluster_service import ClusterService
from ...frontend.operations import Operations
from ..progress import ProgressStep, no_progress
from .kept_worker import DetachedLauncher
from .list_service import ListService
from .worker_pool import WorkerPool

log = logging.getLogger(__name__)

SUPERVISOR = supervisor_pb2.DESCRIPTOR.services_by_name["Supervisor"]
JOIN_S = 600.0  # for Ray to be there: in a pod its containers start in any order
JOIN_PAUSE_S = 2.0


class Ray(DetachedLauncher, Protocol):
    """Where the workers are (`ray_pool.RayPool`)."""

    async def start(self) -> None: ...
    async def lost(self) -> None: ...
    async def close(self) -> None: ...


class SupervisorServer:
    """`start`, then `stop`, whatever happened in `start`; `lost` is set once Ray's head is gone for good."""

    def __init__(self, config: ClusterConfig, ray: Ray) -> None:
        self._config, self._ray = config, ray
        self._tasks = Tasks()
        self.transport = Transport(config.security("supervisor"))
        self.lost = asyncio.Event()
        self._server: Server | None = None
        self._health_server: Server | None = None
        # The model is the gateways' affair: the supervisor needs none, and compares protocols alone.
        required = Requirements(protocol_version=PROTOCOL_VERSION, by="the supervisor")
        self.fleet = Fleet(required, self.transport, failures=self._tasks.failures)
        self.operations = Operations(self.fleet)
        self.pool = WorkerPool(ray, self.fleet, self._tasks, {"prefill": config.prefill, "decode": config.decode})
        self._list = ListService(self.pool, config.cluster_id)

    async def start(self) -> None:
        """Joins Ray, takes over the workers and serves; no start of a worker is waited for.

        Unavailable where no Ray is there after JOIN_S; OSError where the address cannot be bound; what `listen_admin`
        raises.
        """
        health = HealthServicer()
        health.set_serving("", False)
        if self._config.supervisor.health_listen is not None:
            self._health_server = await self.transport.listen_health(self._config.supervisor.health_listen, health)
        await self._join()
        await self.pool.adopt()
        self.operations.manager = self.pool
        cluster = ClusterService(self.fleet, self.operations, _explain, self._fill_status)
        services = {
            CLUSTER: lambda server: worker_pb2_grpc.add_ClusterServicer_to_server(cluster, server),
            SUPERVISOR: lambda server: supervisor_pb2_grpc.add_SupervisorServicer_to_server(self._list, server),
        }
        listen = self._config.supervisor.listen
        self._server = await listen_admin(self.transport, listen, services, setting="supervisor.listen")
        security = self.transport.security
        note_port(self._server.port, security.cluster if security is not None else "", "supervisor")
        for service in ("", *self._server.services):
            health.set_serving(service, True)
        self._tasks.start("guard Ray", self._guard)

    async def _join(self) -> None:
        """Waits for Ray, as long as JOIN_S."""
        end_s = asyncio.get_running_loop().time() + JOIN_S
        while True:
            try:
                return await self._ray.start()
            except Unavailable as error:
                if asyncio.get_running_loop().time() > end_s:
                    raise
                log.warning("Ray is not there yet", extra={"fields": {"why": str(error)}})
                await asyncio.sleep(JOIN_PAUSE_S)

    @property
    def address(self) -> str:
        """host:port, with the port that was bound."""
        assert self._server is not None, "not started"
        return str(parse_address(self._config.supervisor.listen)._replace(port=self._server.port))

    async def end_workers(self, timeout_s: float, step: ProgressStep = no_progress) -> list[str]:
        """Instead of `start`: drains and ends all workers for good; their names."""
        with step("ray"):
            await self._ray.start()
        return await self.pool.end_existing(timeout_s, step)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Ends all of this; the workers stay as they are."""
        if self._server is not None:
            forget_port(self._server.port)
            await self._server.set_serving(False)
            await self._server.stop(0.2)
        if self._health_server is not None:
            await self._health_server.stop()
        await self.operations.stop()
        await self._tasks.stop()
        await self.fleet.close()
        await self.transport.close()
        await self._ray.close()

    async def _guard(self) -> None:
        await self._ray.lost()
        log.error("Ray's head is gone: no worker can be started; this process ends, to begin anew")
        self.lost.set()

    def _fill_status(self, status: worker_pb2.ClusterStatus) -> None:
        status.cluster_id = self._config.cluster_id
        self.pool.fill_status(status)
        status.gateways = self._list.gateways
        status.local_prefill = self._config.gateway.local_prefill != "never"
        if security := self.transport.security:
            status.tls, status.certificate_expires_unix_s = True, round(security.expires_unix_s() or 0)
        status.failing.extend([*self.fleet.tasks.failing, *self._tasks.failing])
        for name, count in self._tasks.failures.items():
            status.task_failures[name] = count


async def _explain(request: GenerateRequest) -> Explanation:
    raise IllegalState("the supervisor places no requests: ask a gateway, with --admin and its admin port")
