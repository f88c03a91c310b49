"""What prefill and decode workers have in common as servers: address, admission while draining, health, reports."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from . import worker_pb2
from .errors import Unavailable
from .reporting import ReportServicer
from .serving import Server, start_server
from .worker_pb2 import WorkerHealth, WorkerReport, WorkerRole
from .worker_pb2_grpc import add_WorkerServicer_to_server


class WorkerServer:
    """The gRPC server of one worker. Health probes see SERVING between `open` and `drain`."""

    def __init__(self, role: WorkerRole.ValueType, listen: str, advertise: str | None, name: str | None) -> None:
        self._role, self._listen, self._advertise, self._name = role, listen, advertise, name
        self._reports = ReportServicer(self.report)
        self._fill: Callable[[WorkerReport], None] = lambda report: None
        self._started_s = time.monotonic()
        self._draining = False
        self._active = 0
        self._failure = ""
        self.end_process: Callable[[], None] | None = None  # called soon after the engine has failed
        self._server: Server | None = None
        self.address = ""

    @property
    def name(self) -> str:
        """The worker's id: the configured name, or one made of role, host and port."""
        role = WorkerRole.Name(self._role).removeprefix("WORKER_ROLE_").lower()
        return self._name or f"{role}-{socket.gethostname()}-{self.address.rpartition(':')[2]}"

    async def open(
        self,
        service: ServiceDescriptor,
        add_servicer: Callable[[grpc.aio.Server], None],
        fill_report: Callable[[WorkerReport], None],
    ) -> None:
        """Starts serving; OSError where the address cannot be bound. `fill_report` completes each report."""
        self._fill = fill_report
        worker_service = worker_pb2.DESCRIPTOR.services_by_name["Worker"]
        self._server = await start_server(
            self._listen,
            {
                service: add_servicer,
                worker_service: lambda server: add_WorkerServicer_to_server(self._reports, server),
            },
        )
        host = self._listen.rpartition(":")[0]
        if host in ("0.0.0.0", "[::]", ""):
            host = socket.gethostbyname(socket.gethostname())
        self.address = self._advertise or f"{host}:{self._server.port}"
        await self._server.set_serving(True)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around each request: counts it, and refuses it with Unavailable while the worker drains."""
        if self._draining:
            raise Unavailable(f"worker {self.name} is draining: it takes no new requests")
        self._active += 1
        self._reports.changed()
        try:
            yield
        finally:
            self._active -= 1
            self._reports.changed()

    def report(self) -> WorkerReport:
        """The worker's report of itself, now."""
        report = WorkerReport(
            worker_id=self.name,
            role=self._role,
            health=self._health(),
            reason=self._failure,
            address=self.address,
            version=version("isthmus"),
            threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            uptime_ms=int((time.monotonic() - self._started_s) * 1e3),
        )
        self._fill(report)
        return report

    def _health(self) -> WorkerHealth.ValueType:
        if self._failure:
            return WorkerHealth.WORKER_HEALTH_FAILED
        return WorkerHealth.WORKER_HEALTH_DRAINING if self._draining else WorkerHealth.WORKER_HEALTH_READY

    def on_engine_failure(self) -> Callable[[str], None]:
        """What an engine calls, from its thread, when it can do no more: the worker is red from then on.

        Its process ends a second later where it has one of its own, so that whoever watches it starts another.
        """
        loop = asyncio.get_running_loop()

        async def fail(reason: str) -> None:
            self._failure = reason
            self._reports.changed()
            if self._server:
                await self._server.set_serving(False)
            if self.end_process:
                loop.call_later(1.0, self.end_process)

        return lambda reason: asyncio.run_coroutine_threadsafe(fail(reason), loop)

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests and returns when the running ones are done, or after `timeout_s`."""
        self._draining = True
        self._reports.changed()
        if self._server:
            await self._server.set_serving(False)
        end_s = time.monotonic() + timeout_s
        while self._active and time.monotonic() < end_s:
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Ends the server; requests that still run are cancelled."""
        if self._server:
            await self._server.stop()
