"""`isthmus.v1.Cluster`: the status of the cluster, and the operations that a person orders."""

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version

from ...proto import worker_pb2, worker_pb2_grpc
from ...proto.generation_pb2 import GenerateRequest
from ...proto.rpc.timeouts import order_timeout_s
from ...proto.worker_pb2 import (
    DrainResponse,
    DrainWorkerRequest,
    Explanation,
    FlipWorkerRequest,
    MemoryUse,
    ScaleRequest,
    ScaleResponse,
    WorkerReport,
)
from ...worker.service import DRAIN_S
from ..fleet.registry import Fleet
from .operations import Operations


class ClusterService(worker_pb2_grpc.ClusterServicer):
    """Status and operations of one fleet."""

    def __init__(
        self,
        fleet: Fleet,
        operations: Operations,
        explain: Callable[[GenerateRequest], Awaitable[Explanation]],
        fill_status: Callable[[worker_pb2.ClusterStatus], None],
    ) -> None:
        """`fill_status` adds what the gateway, or the supervisor, knows of itself."""
        self._explain = explain
        self._fleet = fleet
        self._operations = operations
        self._fill_status = fill_status
        self._start_s = time.monotonic()

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: object) -> worker_pb2.ClusterStatus:
        used_bytes, budget_bytes = self._fleet.table.routing.prefix_bytes
        status = worker_pb2.ClusterStatus(
            version=version("isthmus"),
            workers=[_public(worker) for worker in self._fleet.statuses()],
            uptime_ms=round((time.monotonic() - self._start_s) * 1e3),
            memory=[MemoryUse(name="prefixes", used_bytes=used_bytes, budget_bytes=budget_bytes)],
        )
        self._fill_status(status)
        return status

    async def DrainWorker(self, request: DrainWorkerRequest, context: object) -> DrainResponse:
        return await self._operations.drain(request.worker, _seconds(request))

    async def FlipWorker(self, request: FlipWorkerRequest, context: object) -> WorkerReport:
        return _public(await self._operations.flip(request.worker, request.role, _seconds(request)))

    async def Scale(self, request: ScaleRequest, context: object) -> ScaleResponse:
        prefill = request.prefill if request.HasField("prefill") else None
        decode = request.decode if request.HasField("decode") else None
        return await self._operations.scale(prefill, decode, _seconds(request))

    async def Explain(self, request: GenerateRequest, context: object) -> Explanation:
        return await self._explain(request)


def _seconds(request: DrainWorkerRequest | FlipWorkerRequest | ScaleRequest) -> float:
    return order_timeout_s(request.timeout_s) if request.HasField("timeout_s") else DRAIN_S


def _public(report: WorkerReport) -> WorkerReport:
    """A report as clients may see it: without the path of the model on the worker's disk."""
    shown = WorkerReport()
    shown.CopyFrom(report)
    shown.model.ClearField("path")
    return shown
