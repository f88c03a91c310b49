"""The Worker service: a worker's report of itself, on request and as a stream."""

import asyncio
from collections.abc import Callable

import grpc.aio

from .worker_pb2 import GetReportRequest, WatchRequest, WorkerReport
from .worker_pb2_grpc import WorkerServicer

WATCH_PERIOD_S = 0.1  # a watcher hears from a live worker at least that often


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

    async def Watch(self, request: WatchRequest, context: grpc.aio.ServicerContext) -> None:
        while True:
            change = self._change
            await context.write(self._report())
            try:
                async with asyncio.timeout(WATCH_PERIOD_S):  # wait_for can swallow a cancellation
                    await change.wait()
            except TimeoutError:
                continue
