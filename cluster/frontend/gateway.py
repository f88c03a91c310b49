"""The gateway: what clients talk to. It checks, tokenizes, places and streams; it never touches KV.

The life of a request here: `resolve` (requests/request.py), page hashes (requests/prepare.py), `admit`
(requests/admission_queue.py), `route` (router/router.py, requests/dispatch.py) and `Decode.Generate` with the deadline
that is left (requests/attempt.py), a `Session` (requests/session.py) that makes the client's events, until the answer
is finished (requests/generator.py). Whatever ends the handler cancels the inner call, and that frees everything below.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from ...kvtransfer.frame import PROTOCOL_VERSION
from ...proto import generation_pb2, generation_pb2_grpc, worker_pb2, worker_pb2_grpc
from ...proto.rpc.addresses import parse_address
from ...proto.rpc.server import Server
from ...proto.rpc.transport import MIB, Transport
from ...proto.security.credentials import Security
from ...proto.security.state import forget_port, note_port
from ...proto.tasks import Tasks
from ..fleet.compatibility import Requirements
from ..fleet.preflight import Preflight
from ..fleet.registry import Fleet
from ..gateway_config import GatewayConfig
from ..jobs.service.manager import Jobs
from ..jobs.service.service import SERVICE as JOBS_SERVICE
from ..requests.generator import Generator
from ..router.router import servable_codecs
from ..text.served import ServedModel
from .cluster_service import ClusterService
from .generation_service import GenerationService
from .load import Load
from .operations import Operations

DEFAULTS = GatewayConfig()
MAX_MESSAGE_BYTES = 4 * MIB
HEALTH_PERIOD_S = 1.0  # between two checks of whether all background tasks do their work
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"],
    worker_pb2.DESCRIPTOR.services_by_name["Cluster"],
)


class Gateway:
    """The gateway as a server: `start`, then `drain` and `stop`. Healthy while its workers can serve a request."""

    def __init__(
        self,
        listen: str,
        model: ServedModel,
        workers: Iterable[str] = (),
        config: GatewayConfig = DEFAULTS,
        owner: Tasks | None = None,
        *,
        cluster_id: str = "",
        security: Security | None = None,
    ) -> None:
        """`owner`: background tasks of the gateway's owner, whose failures count as the gateway's own.

        `cluster_id`: what `isthmus status` shows; "" where the workers are a given list. `security`: the certificates
        that it has; None: plain text.
        """
        self._cluster_id = cluster_id
        self._listen = listen
        self._model = replace(model, limits=config.input_limits)
        self._workers = tuple(workers)
        self._config = config
        self._server: Server | None = None
        self._jobs: Jobs | None = None
        self.transport = Transport(security)
        self._health_server: Server | None = None
        self._owner = owner or Tasks()
        self.failures = self._owner.failures
        self._tasks = Tasks(self.failures)
        self.ready = asyncio.Event()

    async def start(self) -> None:
        """Listens and starts to watch the workers, and to run jobs where it has a database of them.

        OSError where the address cannot be bound; what `Jobs.open` raises.
        """
        required = Requirements(
            protocol_version=PROTOCOL_VERSION, model=self._model.name, fingerprint=self._model.fingerprint
        )
        self.fleet = Fleet(required, self.transport, verify=self._config.preflight, failures=self.failures)
        self._preflight = Preflight(self.fleet, self._model, self.failures)
        self.load = Load()
        self.generator = Generator(self._model, self.fleet, self._config)
        self._generation = GenerationService(self._model, self.fleet.table, self.generator, self.load, self._config)
        self.operations = Operations(self.fleet)
        cluster = ClusterService(self.fleet, self.operations, self.generator, self._fill_status)
        adders = (
            lambda server: generation_pb2_grpc.add_GenerationServicer_to_server(self._generation, server),
            lambda server: worker_pb2_grpc.add_ClusterServicer_to_server(cluster, server),
        )
        services = dict(zip(SERVICES, adders, strict=True))
        if self._config.jobs_db is not None:
            self._jobs = await self._open_jobs(self._config.jobs_db)
            services[JOBS_SERVICE] = self._jobs.add_to
        security = self.transport.security
        self._server = await self.transport.listen(
            *(self._listen, services),
            max_request_bytes=MAX_MESSAGE_BYTES,
            client_certificates=security is not None and security.client_certificates,
            open_to_all=(SERVICES[1].full_name,),  # it has no port of its own yet
        )
        note_port(self._server.port, security.cluster if security is not None else "", "gateway")
        if self._config.health_listen is not None:
            self._health_server = await self.transport.listen_health(self._config.health_listen, self._server.health)
        for address in self._workers:
            self.fleet.add(address)
        if self._config.preflight:
            self._preflight.start()
        if self._jobs is not None:
            await self._jobs.start(f"{socket.gethostname()} {self.address}")
        self._tasks.start("health", partial(self._follow_health, self._server))

    async def _open_jobs(self, url: str) -> Jobs:
        return await Jobs.open(
            url,
            self._model,
            self.generator,
            default_codec=self.fleet.table.default_codec,
            reports=self.fleet.statuses,
            others=lambda: self.load.active,
            settings=self._config.jobs,
            failures=self.failures,
        )

    @property
    def address(self) -> str:
        """host:port, with the port that was bound."""
        assert self._server is not None, "not started"
        return str(parse_address(self._listen)._replace(port=self._server.port))

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the running ones; whether all have ended in time.

        Jobs stop at once: they go on at another gateway, or at the next start of this one.
        """
        if self._server is None:
            return True
        self._generation.draining = True
        await self._server.set_serving(False)
        if self._jobs is not None:
            await self._jobs.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # wait_for can swallow a cancellation
                await self.load.wait_idle()
        return not self.load.active

    async def stop(self) -> None:
        """Cancels what still runs and closes everything."""
        await self._tasks.stop()
        if self._server is not None:
            forget_port(self._server.port)
            await self._server.stop(0.2)
        if self._health_server is not None:
            await self._health_server.stop()
        if self._jobs is not None:
            await self._jobs.stop()
        if self._server is not None:
            await self.operations.stop()
            await self._preflight.stop()
            await self.fleet.close()
        await self.transport.close()

    async def _follow_health(self, server: Server) -> None:
        try:
            while True:
                change = self.fleet.change
                can_serve = bool(servable_codecs(self.fleet.table.routing, self._config.local_prefill))
                healthy = can_serve and not self._generation.draining and not self._failing()
                await server.set_serving(healthy, but=[JOBS_SERVICE.full_name] if self._jobs_failing() else [])
                if can_serve:
                    self.ready.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEALTH_PERIOD_S):
                        await change.wait()
        except Exception:
            await server.set_serving(False)
            raise

    def _failing(self) -> list[str]:
        """Background tasks that fail again and again, and without which no request is served as it should be."""
        return [*self.fleet.tasks.failing, *self._tasks.failing, *self._owner.failing]

    def _jobs_failing(self) -> list[str]:
        return self._jobs.failing if self._jobs is not None else []

    def _fill_status(self, status: worker_pb2.ClusterStatus) -> None:
        status.active_requests, status.cluster_id = self.load.active, self._cluster_id
        status.failing.extend([*self._failing(), *self._jobs_failing()])
        if security := self.transport.security:
            status.tls, status.certificate_expires_unix_s = True, round(security.expires_unix_s() or 0)
        for name, count in self.failures.items():
            status.task_failures[name] = count
