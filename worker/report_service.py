"""The Worker service: a worker's report of itself, on request and as a stream."""

import asyncio
import time
from collections.abc import Callable

import grpc.aio

from ..proto.worker_pb2 import GetReportRequest, WatchRequest, WorkerReport
from ..proto.worker_pb2_grpc import WorkerServicer

CHANGE_S = 0.1  # a watcher hears of a change of load within that time, and of `changed` at once
HEARTBEAT_S = 0.7  # and from a live worker whose report stays the same about that often


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
        last, last_s = WorkerReport(), -HEARTBEAT_S
        while True:
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
