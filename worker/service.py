"""The Worker service: a worker's reports of itself, and the orders that it takes from whoever runs the cluster."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio

from ..proto.errors import InvalidRequest
from ..proto.rpc.timeouts import order_timeout_s
from ..proto.worker_pb2 import (
    DrainRequest,
    DrainResponse,
    FlipRequest,
    GetReportRequest,
    WatchRequest,
    WorkerReport,
    WorkerRole,
)
from ..proto.worker_pb2_grpc import WorkerServicer

CHANGE_S = 0.1  # a watcher gets a report within that time of a change of load, and at once after `changed`
WATCH_S = 300.0  # after which a stream ends, for its watcher to open another: a connection shall not be kept for ever
HEARTBEAT_S = 0.7  # and about that often from a live worker whose report stays the same
DRAIN_S = 30.0  # for running requests to end by themselves, where nobody says how long


@dataclass(frozen=True)
class Drained:
    """How many requests ran when a drain began, by how they ended."""

    finished: int
    handed_over: int


class Orders(Protocol):
    """What the owner of a worker's process does with orders. A worker inside another program has no such owner."""

    async def prepare_flip(self, role: WorkerRole.ValueType) -> bool:
        """Makes ready what can be while the worker still serves; whether a flip to `role` changes anything.

        InvalidRequest where there is no such role; Incompatible where this worker cannot take it, and then it goes on.
        """
        ...

    def flip(self, role: WorkerRole.ValueType) -> None:
        """Changes the role of the drained worker."""
        ...

    def left(self) -> None:
        """The worker was drained for good."""
        ...


class ReportServicer(WorkerServicer):
    """Serves what `report` returns; `changed` wakes the watchers between two periods."""

    def __init__(self, report: Callable[[], WorkerReport]) -> None:
        self._report = report
        self._change = asyncio.Event()

    def changed(self) -> None:
        """Has every watcher get a report now. From the event loop's thread."""
        self._change.set()
        self._change = asyncio.Event()

    async def GetReport(self, request: GetReportRequest, context: grpc.aio.ServicerContext) -> WorkerReport:
        return self._report()

    async def Watch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: WatchRequest, context: grpc.aio.ServicerContext
    ) -> None:
        last, last_s, end_s = WorkerReport(), -HEARTBEAT_S, time.monotonic() + WATCH_S
        while time.monotonic() < end_s:
            change, report, now = self._change, self._report(), time.monotonic()
            uptime_ms, report.uptime_ms = report.uptime_ms, 0
            if now >= last_s + HEARTBEAT_S or report != last:
                last.CopyFrom(report)
                last_s, report.uptime_ms = now, uptime_ms
                await context.write(report)
            try:
                async with asyncio.timeout(CHANGE_S):  # wait_for can swallow a cancellation
                    await change.wait()
            except TimeoutError:
                continue


class OrderServicer(ReportServicer):
    """Serves reports, `Drain` and `Flip`. What follows a drain begins once the response is sent.

    An order is carried out to its end also where its caller goes away: no worker is left drained for nothing.
    """

    def __init__(self, report: Callable[[], WorkerReport], drain: Callable[[float], Awaitable[Drained]]) -> None:
        super().__init__(report)
        self._drain = drain
        self.orders: Orders | None = None

    async def Drain(self, request: DrainRequest, context: grpc.aio.ServicerContext) -> DrainResponse:
        orders, timeout_s = self._owner(), _seconds(request)
        return await self._drain_then(orders.left, timeout_s, context)

    async def Flip(self, request: FlipRequest, context: grpc.aio.ServicerContext) -> DrainResponse:
        orders, timeout_s = self._owner(), _seconds(request)
        if not await orders.prepare_flip(request.role):
            return DrainResponse()
        return await self._drain_then(lambda: orders.flip(request.role), timeout_s, context)

    async def _drain_then(
        self, follow: Callable[[], None], timeout_s: float, context: grpc.aio.ServicerContext
    ) -> DrainResponse:
        draining = asyncio.ensure_future(self._drain(timeout_s))
        try:
            drained = await asyncio.shield(draining)
        except asyncio.CancelledError:
            draining.add_done_callback(lambda done: None if done.cancelled() or done.exception() else follow())
            raise
        _after(context, follow)
        return DrainResponse(finished=drained.finished, handed_over=drained.handed_over)

    def _owner(self) -> Orders:
        if self.orders is None:
            raise InvalidRequest("this worker runs inside another program and takes no orders")
        return self.orders


def _seconds(request: DrainRequest | FlipRequest) -> float:
    return order_timeout_s(request.timeout_s) if request.HasField("timeout_s") else DRAIN_S


def _after(context: Any, call: Callable[[], None]) -> None:
    context.add_done_callback(lambda _: call())
