"""The Worker service in full: the reports, and the orders that a worker takes from whoever runs the cluster."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio

from ..proto.errors import InvalidRequest
from ..proto.rpc.timeouts import order_timeout_s
from ..proto.worker_pb2 import DrainRequest, DrainResponse, FlipRequest, WorkerReport, WorkerRole
from .report_service import ReportServicer

DRAIN_S = 30.0  # for running requests to end by themselves, where nobody says how long


@dataclass(frozen=True)
class Drained:
    """How many requests ran when a drain began, by how they ended."""

    finished: int
    handed_over: int


class Orders(Protocol):
    """The owner of a worker, who follows an order once it was drained. Not to be found for a worker without one."""

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


class OrderServicer(ReportServicer):
    """Serves reports, `Drain` and `Flip`. What follows a drain begins once its answer is sent.

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
