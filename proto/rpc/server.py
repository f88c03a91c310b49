"""A started gRPC server: health for each service, reflection, and an end that is bounded in time."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..backoff import Restarts
from .health import HealthServicer

log = logging.getLogger(__name__)

_STOP_LIMIT_S = 5.0
_AGAIN_PAUSE_S, _LAST_AGAIN_PAUSE_S, _CALM_S = 0.02, 0.25, 60.0  # before it listens again, where that is due often
_MOST_LEFT = 8  # servers whose loop has ended: calls of older ones are ended

Services = Mapping[ServiceDescriptor, Callable[[grpc.aio.Server], None]]  # each with the call that adds its servicer


@dataclass(kw_only=True)
class Server:
    """A server; `health` tells probes about each service by its full name.

    One call whose path is no UTF-8 ends the loop by which grpc.aio (1.85.1) takes new calls, and its port, for good,
    whoever sent it. The calls that run go on; this listens anew at the same port.
    """

    grpc_server: grpc.aio.Server
    again: Callable[[int], grpc.aio.Server]  # another one at that port, not started; OSError
    health: HealthServicer
    port: int
    services: tuple[str, ...]
    _stopping: asyncio.Future[None] | None = field(default=None, init=False)
    _listening: asyncio.Task[None] | None = field(default=None, init=False)  # anew
    _left: deque[grpc.aio.Server] = field(default_factory=deque, init=False)  # calls may run there still
    _ends: Restarts = field(default_factory=lambda: Restarts(_AGAIN_PAUSE_S, _LAST_AGAIN_PAUSE_S, _CALM_S), init=False)

    async def start(self) -> None:
        """Takes calls from now on."""
        before = asyncio.all_tasks()
        await self.grpc_server.start()
        self._ends.began(time.monotonic())
        for task in asyncio.all_tasks() - before:
            if "cython" in type(task.get_coro()).__module__:  # one of them is its loop; no public name tells which
                task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or not isinstance(task.exception(), UnicodeDecodeError) or self._stopping is not None:
            return
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen_again(), name=f"listen again on port {self.port}")

    async def _listen_again(self) -> None:
        log.error("a call with a path that is no text ended a server's loop: it listens anew, running calls go on")
        self._ends.ended(time.monotonic())
        self._left.append(self.grpc_server)
        if len(self._left) > _MOST_LEFT:
            with contextlib.suppress(UnicodeDecodeError):
                await self._left.popleft().stop(0)
        while True:
            await asyncio.sleep(max(0.0, self._ends.next_s - time.monotonic()))
            try:
                self.grpc_server = self.again(self.port)
                break
            except OSError:  # the old one has not left it yet
                self._ends.ended(time.monotonic())
        await self.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the server: new calls are refused, running ones cancelled after the first stop's `grace_s`.

        grpc.aio was seen to wait for ever where a call's deadline passed as it arrived: this gives up on it. It is told
        to stop once only: of two that stop a server at the same time, the later one cancels the calls of a server that
        is gone by then, and the process dies (grpcio 1.85.1, its cancel_all_calls of a null pointer).
        """
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace_s))
        done, _ = await asyncio.wait([self._stopping], timeout=grace_s + _STOP_LIMIT_S)
        if not done:
            log.warning("the server on port %d did not end within %.0f s", self.port, _STOP_LIMIT_S)

    async def _stop(self, grace_s: float) -> None:
        if self._listening is not None:
            self._listening.cancel()
        await asyncio.gather(
            *(server.stop(grace_s) for server in (*self._left, self.grpc_server)), return_exceptions=True
        )

    async def set_serving(self, serving: bool, *, but: Collection[str] = ()) -> None:
        """Answers health probes for every service of this server, and for the empty name, which stands for all.

        The services `but` do not serve in any case.
        """
        for name in ("", *self.services):
            self.health.set_serving(name, serving and name not in but and (name != "" or not but))


def add_services(server: grpc.aio.Server, services: Services, health: HealthServicer) -> None:
    """Adds services to a server that is not started, and health and reflection for them."""
    for add in services.values():
        add(server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [descriptor.full_name for descriptor in services]
    known = (*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(known, server)
