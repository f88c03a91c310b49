"""The gRPC server of a worker of either role: its address, its running requests and drains, health, reports."""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from ..proto import worker_pb2
from ..proto.errors import Unavailable
from ..proto.rpc.addresses import address_for_others, parse_address
from ..proto.rpc.server import Server
from ..proto.rpc.transport import Transport
from ..proto.worker_pb2 import WorkerHealth, WorkerReport, WorkerRole
from ..proto.worker_pb2_grpc import add_WorkerServicer_to_server
from .service import Drained, Orders, OrderServicer

HAND_OVER_S = 5.0  # for requests that a drain has ended to be gone


class WorkerServer:
    """The gRPC server of one worker. Health probes see SERVING between `open` and `drain`."""

    def __init__(
        self,
        role: WorkerRole.ValueType,
        listen: str,
        advertise: str | None,
        name: str | None,
        transport: Transport,
        *,
        health_listen: str | None = None,
    ) -> None:
        """`health_listen`: where it answers health probes in plain text, besides."""
        self._role, self._listen, self._advertise, self._name = role, listen, advertise, name
        self._transport, self._health_listen = transport, health_listen
        self._reports = OrderServicer(self.report, self.drain)
        self._fill: Callable[[WorkerReport], None] = lambda report: None
        self._started_s = time.monotonic()
        self.instance = secrets.token_hex(8)  # PROCESS.ROLE_NUMBER where the process may flip
        self._draining = False
        self._running: set[asyncio.Task[None]] = set()  # handlers of requests
        self._handed_over: set[asyncio.Task[None]] = set()  # of those, the ones that a drain has ended
        self._failure = ""
        self.flip_failure = ""  # why its process could not take the other role, and goes on in this one
        self.end_process: Callable[[], None] | None = None  # called soon after the engine has failed
        self._server: Server | None = None
        self._health_server: Server | None = None
        self.address = ""

    @property
    def name(self) -> str:
        """The worker's id: the configured name, or one made of role, host and port."""
        role = WorkerRole.Name(self._role).removeprefix("WORKER_ROLE_").lower()
        return self._name or f"{role}-{socket.gethostname()}-{parse_address(self.address or self._listen).port}"

    @property
    def service(self) -> OrderServicer:
        """Its reports and orders, for another door of the same process."""
        return self._reports

    @property
    def orders(self) -> Orders | None:
        """Who follows the orders that this worker is given."""
        return self._reports.orders

    @orders.setter
    def orders(self, orders: Orders | None) -> None:
        self._reports.orders = orders

    @property
    def bound_health(self) -> str | None:
        """host:port of health probes in plain text, with the port that was bound; None where there is none."""
        if self._health_listen is None or self._health_server is None:
            return self._health_listen
        return str(parse_address(self._health_listen)._replace(port=self._health_server.port))

    @property
    def bound(self) -> str:
        """host:port as listened on, with the port that was bound."""
        return str(parse_address(self._listen)._replace(port=self._server.port)) if self._server else self._listen

    async def open(
        self,
        service: ServiceDescriptor,
        add_servicer: Callable[[grpc.aio.Server], None],
        fill_report: Callable[[WorkerReport], None],
    ) -> None:
        """Starts serving; OSError where the address cannot be bound. `fill_report` completes each report."""
        self._fill = fill_report
        others = await asyncio.to_thread(address_for_others, parse_address(self._listen))
        worker_service = worker_pb2.DESCRIPTOR.services_by_name["Worker"]
        self._server = await self._transport.listen(
            self._listen,
            {
                service: add_servicer,
                worker_service: lambda server: add_WorkerServicer_to_server(self._reports, server),
            },
        )
        if self._health_listen is not None:
            self._health_server = await self._transport.listen_health(self._health_listen, self._server.health)
        self.address = self._advertise or str(others._replace(port=self._server.port))
        await self._server.set_serving(True)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around each request, in its handler's task: counts it, and refuses it while the worker drains.

        Unavailable also for a request that a drain hands over: its caller goes on with another worker.
        """
        if self._draining:
            raise Unavailable(f"worker {self.name} is draining: it takes no new requests")
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._reports.changed()
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._handed_over or task.uncancel():
                raise  # the caller went away
            raise Unavailable(f"worker {self.name} was drained: the request goes on elsewhere") from None
        finally:
            self._running.discard(task)
            self._reports.changed()

    def report(self) -> WorkerReport:
        """The worker's report of itself, now."""
        report = WorkerReport(
            worker_id=self.name,
            role=self._role,
            health=self._health(),
            reason=self._failure,
            address=self.address,
            advertise=self._advertise or "",
            version=version("isthmus"),
            threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            uptime_ms=int((time.monotonic() - self._started_s) * 1e3),
            instance=self.instance,
            flip_failure=self.flip_failure,
        )
        if security := self._transport.security:
            report.tls, report.certificate_expires_unix_s = True, round(security.expires_unix_s() or 0)
        self._fill(report)
        return report

    def _health(self) -> WorkerHealth.ValueType:
        if self._failure:
            return WorkerHealth.WORKER_HEALTH_FAILED
        return WorkerHealth.WORKER_HEALTH_DRAINING if self._draining else WorkerHealth.WORKER_HEALTH_READY

    def on_engine_failure(self) -> Callable[[str], None]:
        """What an engine calls, from its thread, when it has failed: the worker reports FAILED from then on.

        Its process ends a second later where it has one of its own, so that whoever watches it starts another.
        """
        loop = asyncio.get_running_loop()

        async def fail(reason: str) -> None:
            self._failure = reason
            self._reports.changed()
            if self.end_process:
                loop.call_later(1.0, self.end_process)  # first: whatever else fails, the process ends
            if self._server:
                await self._server.set_serving(False)

        def failed(reason: str) -> None:
            asyncio.run_coroutine_threadsafe(fail(reason), loop)

        return failed

    async def drain(self, timeout_s: float) -> Drained:
        """Takes no new requests and returns when nothing runs any more.

        Requests that still run after `timeout_s` are handed over: they end with Unavailable, so that whoever called
        goes on with another worker. HAND_OVER_S bounds that.
        """
        self._draining = True
        self._reports.changed()
        if self._server:
            await self._server.set_serving(False)
        begun = set(self._running)
        await self._until_idle(timeout_s)
        left = set(self._running)
        for task in left:
            self._handed_over.add(task)
            task.add_done_callback(self._handed_over.discard)  # also where it ends later than the wait below
            task.cancel()
        await self._until_idle(HAND_OVER_S)
        return Drained(finished=len(begun - left), handed_over=len(left))

    async def _until_idle(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while self._running and time.monotonic() < end_s:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Ends the server; requests that still run are cancelled."""
        for server in (self._server, self._health_server):
            if server:
                await server.stop()
