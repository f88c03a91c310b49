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
from ...proto.rpc.addresses import HostPort, parse_address
from ...proto.rpc.server import Server, Services
from ...proto.rpc.transport import Transport
from ...proto.security.credentials import Security
from ...proto.security.state import forget_port, note_port
from ...proto.tasks import Tasks
from .. import defaults
from ..access.access import Access, check_listen
from ..access.interceptor import AccessInterceptor
from ..access.refusals import Refusals
from ..fleet.compatibility import Requirements
from ..fleet.preflight import Preflight
from ..fleet.registry import Fleet
from ..fleet.shortage import Shortage
from ..fleet.supervised import SupervisedWorkers
from ..gateway_config import GatewayConfig
from ..http.server import HttpServer
from ..jobs.service.manager import Jobs
from ..jobs.service.service import SERVICE as JOBS_SERVICE
from ..requests.generator import Generator
from ..router.router import servable_codecs
from ..smg.behind import Behind
from ..smg.offered import vllm_engine
from ..text.served import ServedModel
from .admin import CLUSTER, MAX_MESSAGE_BYTES, listen_admin
from .answering import Answering
from .cluster_service import ClusterService
from .doors import listen_http
from .generation_service import GenerationService
from .load import Load
from .models import Models
from .operations import Operations

DEFAULTS = GatewayConfig()
HEALTH_PERIOD_S = 1.0  # between two checks of whether all background tasks do their work
GENERATION = generation_pb2.DESCRIPTOR.services_by_name["Generation"]


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
        log_content: bool = False,
        security: Security | None = None,
    ) -> None:
        """`owner`: background tasks of the gateway's owner, whose failures count as the gateway's own.

        `cluster_id`: what `isthmus status` shows; "" where the workers are a given list. `log_content`: whether prompts
        and outputs are logged. `security`: the certificates that it has; None: plain text.
        """
        self.access = Access(config.access)
        self._log_content = log_content
        self._cluster_id = cluster_id
        self._listen = listen
        self._model = replace(model, limits=config.input_limits)
        self._workers = tuple(workers)
        self._config = config
        self._server: Server | None = None
        self._admin: Server | None = None
        self.http: HttpServer | None = None
        self._jobs: Jobs | None = None
        self._supervised: SupervisedWorkers | None = None
        self._leaving = False
        self.transport = Transport(security)
        self._health_server: Server | None = None
        self._owner = owner or Tasks()
        self.failures = self._owner.failures
        self._tasks = Tasks(self.failures)
        self.ready = asyncio.Event()

    async def start(self) -> None:
        """Listens and starts to watch the workers, and to run jobs where it has a database of them.

        OSError where an address cannot be bound; InvalidRequest where nobody has said who may ask there; what
        `listen_admin` and `Jobs.open` raise.
        """
        check_listen(self._config.access, self._listen)
        await self.access.start(self._tasks)
        required = Requirements(
            protocol_version=PROTOCOL_VERSION, model=self._model.name, fingerprint=self._model.fingerprint
        )
        self.fleet = Fleet(required, self.transport, verify=self._config.preflight, failures=self.failures)
        self._preflight = Preflight(self.fleet, self._model, self.failures)
        self.load = Load()
        supervisor, shortage = self._config.supervisor, Shortage(self.fleet.table.routing, self._config.local_prefill)
        self.generator = Generator(
            *(self._model, self.fleet, self._config, shortage if supervisor else None), log_content=self._log_content
        )
        self._answering = Answering(self.generator, self.load, self.access, self._config.sign_of_life_s)
        models = Models(self._model, self.fleet.table, self._config.local_prefill)
        generation = GenerationService(self._answering, models)
        self.operations = Operations(self.fleet, supervisor)
        cluster = ClusterService(self.fleet, self.operations, self.generator.explain, self._fill_status)
        services: Services = {
            GENERATION: lambda server: generation_pb2_grpc.add_GenerationServicer_to_server(generation, server)
        }
        if self._config.engine_protocol == "vllm":
            services = {**services, **vllm_engine(self._behind(models))}
        orders: Services = {CLUSTER: lambda server: worker_pb2_grpc.add_ClusterServicer_to_server(cluster, server)}
        if self._config.jobs_db is not None:
            self._jobs = await self._open_jobs(self._config.jobs_db)
            services = {**services, JOBS_SERVICE: self._jobs.add_to}
        security, refusals = self.transport.security, Refusals(self.access)
        self._admin = await listen_admin(self.transport, self._admin_listen, orders, setting="gateway.admin_listen")
        self._server = await self.transport.listen(
            self._listen,
            services,
            max_request_bytes=MAX_MESSAGE_BYTES,
            client_certificates=security is not None and security.client_certificates,
            interceptors=[AccessInterceptor(self.access, refusals)],
        )
        self.http = await listen_http(
            *(self._config, security, self._answering, self._model, models, self.access, refusals, self._is_healthy)
        )
        for server in (self._server, self._admin):
            note_port(server.port, security.cluster if security is not None else "", "gateway")
        if self._config.health_listen is not None:
            self._health_server = await self.transport.listen_health(self._config.health_listen, self._server.health)
        for address in self._workers:
            self.fleet.add(address)
        if supervisor is not None:
            self._supervised = SupervisedWorkers(supervisor, self.fleet, self.transport, shortage, self._name)
            self._supervised.start()
        if self._config.preflight:
            self._preflight.start()
        if self._jobs is not None:
            await self._jobs.start(self._name)
        self._tasks.start("health", partial(self._follow_health, self._server))

    def _behind(self, models: Models) -> Behind:
        """What the door for others' gateways needs of this one."""
        return Behind(
            answer=self._answering.answer,
            model=self._model,
            describe=models.describe,
            reports=self.fleet.statuses,
            active=lambda: self.load.active,
            serving=lambda: self._server is not None and self._server.health.serves(GENERATION.full_name),
        )

    async def _open_jobs(self, url: str) -> Jobs:
        return await Jobs.open(
            url,
            self._model,
            self.generator,
            default_codec=self.fleet.table.default_codec,
            reports=self.fleet.statuses,
            others=lambda: self.load.active,
            settings=self._config.jobs,
            access=self.access,
            failures=self.failures,
        )

    @property
    def _name(self) -> str:
        """Of this gateway, among those that share workers or jobs."""
        return f"{socket.gethostname()} {self.address}"

    @property
    def address(self) -> str:
        """host:port, with the port that was bound."""
        assert self._server is not None, "not started"
        return str(parse_address(self._listen)._replace(port=self._server.port))

    @property
    def admin_address(self) -> str:
        """The same of its admin port."""
        assert self._admin is not None, "not started"
        return str(parse_address(self._admin_listen)._replace(port=self._admin.port))

    @property
    def http_url(self) -> str | None:
        """Where HTTP is answered, as clients name it; None: nowhere."""
        return self.http.url if self.http is not None else None

    @property
    def _admin_listen(self) -> str:
        free = parse_address(self._listen).port == 0
        return self._config.admin_listen or (str(HostPort(defaults.HOST, 0)) if free else defaults.ADMIN)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the running ones; whether all have ended in time.

        Health is red first, for `propagation_s`, in which whoever does not know it yet is served still. Jobs stop at
        once: they go on at another gateway, or at the next start of this one.
        """
        if self._server is None:
            return True
        self._leaving = True
        await self._server.set_serving(False)
        if timeout_s:
            await asyncio.sleep(self._config.propagation_s)
        self._answering.draining = True
        if self._jobs is not None:
            await self._jobs.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # wait_for can swallow a cancellation
                await self.load.wait_idle()
        return not self.load.active

    async def stop(self) -> None:
        """Cancels what still runs and closes everything."""
        await self._tasks.stop()
        if self.http is not None:
            await self.http.stop(0.2)
        if self._server is not None:
            forget_port(self._server.port)
            await self._server.stop(0.2)
        if self._admin is not None:
            forget_port(self._admin.port)
            await self._admin.stop(0.2)
        if self._health_server is not None:
            await self._health_server.stop()
        if self._jobs is not None:
            await self._jobs.stop()
        if self._server is not None:
            await self.operations.stop()
            if self._supervised is not None:
                await self._supervised.stop()
            await self._preflight.stop()
            await self.fleet.close()
        await self.transport.close()

    async def _follow_health(self, server: Server) -> None:
        try:
            while True:
                change = self.fleet.change
                can_serve = self._can_serve()
                await server.set_serving(
                    self._is_healthy(), but=[JOBS_SERVICE.full_name] if self._jobs_failing() else []
                )
                if can_serve:
                    self.ready.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEALTH_PERIOD_S):
                        await change.wait()
        except Exception:
            await server.set_serving(False)
            raise

    def _can_serve(self) -> bool:
        return bool(servable_codecs(self.fleet.table.routing, self._config.local_prefill))

    def _is_healthy(self) -> bool:
        return self._can_serve() and not self._leaving and not self._failing()

    def _failing(self) -> list[str]:
        """Background tasks that fail again and again, and without which no request is served as it should be."""
        supervised = self._supervised.failing if self._supervised is not None else []
        return [*self.fleet.tasks.failing, *supervised, *self._tasks.failing, *self._owner.failing]

    def _jobs_failing(self) -> list[str]:
        return self._jobs.failing if self._jobs is not None else []

    def _fill_status(self, status: worker_pb2.ClusterStatus) -> None:
        status.active_requests, status.cluster_id = self.load.active, self._cluster_id
        if self._supervised is not None:
            self._supervised.fill_status(status)
        if self.operations.manager is not None:
            status.wanted.update(self.operations.manager.wanted())
        status.local_prefill = self._config.local_prefill != "never"
        status.failing.extend([*self._failing(), *self._jobs_failing()])
        if security := self.transport.security:
            status.tls, status.certificate_expires_unix_s = True, round(security.expires_unix_s() or 0)
        for name, count in self.failures.items():
            status.task_failures[name] = count
        self.access.fill_status(status.access)
        status.log_content, status.http = self._log_content, self.http_url or ""
