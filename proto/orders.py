"""The Worker service in full: the reports, and the orders that a worker takes from whoever runs the cluster."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio

from .errors import InvalidRequest
from .reporting import ReportServicer
from .worker_pb2 import DrainRequest, DrainResponse, FlipRequest, WorkerReport, WorkerRole

DRAIN_S = 30.0  # for running requests to end by themselves, where nobody says how long


@dataclass(frozen=True)
class Drained:
    """How many requests ran when a drain began, by how they ended."""

    finished: int
    handed_over: int


class Orders(Protocol):
    """The owner of a worker, who follows an order once it was drained. Not to be found for a worker without one."""

    def check_flip(self, role: WorkerRole.ValueType) -> bool:
        """Whether a flip to `role` changes anything; InvalidRequest where it cannot be."""
        ...

    def flip(self, role: WorkerRole.ValueType) -> None:
        """Changes the role of the drained worker."""
        ...

    def left(self) -> None:
        """The worker was drained for good."""
        ...


class OrderServicer(ReportServicer):
    """Serves reports, `Drain` and `Flip`. What follows a drain begins once its answer is sent."""

    def __init__(self, report: Callable[[], WorkerReport], drain: Callable[[float], Awaitable[Drained]]) -> None:
        super().__init__(report)
        self._drain = drain
        self.orders: Orders | None = None

    async def Drain(self, request: DrainRequest, context: grpc.aio.ServicerContext) -> DrainResponse:
        orders = self._owner()
        drained = await self._drain(request.timeout_s if request.HasField("timeout_s") else DRAIN_S)
        _after(context, orders.left)
        return DrainResponse(finished=drained.finished, handed_over=drained.handed_over)

    async def Flip(self, request: FlipRequest, context: grpc.aio.ServicerContext) -> DrainResponse:
        orders = self._owner()
        if not orders.check_flip(request.role):
            return DrainResponse()
        drained = await self._drain(request.timeout_s if request.HasField("timeout_s") else DRAIN_S)
        _after(context, lambda: orders.flip(request.role))
        return DrainResponse(finished=drained.finished, handed_over=drained.handed_over)

    def _owner(self) -> Orders:
        if self.orders is None:
            raise InvalidRequest("this worker runs inside another program and takes no orders")
        return self.orders


def _after(context: Any, call: Callable[[], None]) -> None:
    context.add_done_callback(lambda _: call())
