"""`isthmus.v1.Supervisor`: the list of workers, for gateways."""

import asyncio
import contextlib
from collections.abc import Collection

import grpc.aio

from ....proto.supervisor_pb2 import WatchWorkersRequest, WorkerList
from ....proto.supervisor_pb2_grpc import SupervisorServicer
from ...fleet.report import ROLE_OF, Role
from .worker_pool import WorkerPool

LIST_S = 5.0  # between two lists without a change


class ListService(SupervisorServicer):
    """Tells the workers of one pool; requests that wait at gateways have it started, where it is empty."""

    def __init__(self, pool: WorkerPool, cluster_id: str) -> None:
        self._pool, self._cluster_id = pool, cluster_id
        self._watching: dict[object, Collection[Role]] = {}  # the roles that each gateway waits for

    @property
    def gateways(self) -> int:
        """How many watch now."""
        return len(self._watching)

    async def WatchWorkers(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: WatchWorkersRequest, context: grpc.aio.ServicerContext
    ) -> None:
        this = object()
        waiting = self._watching[this] = {ROLE_OF[role] for role in request.waiting_for if role in ROLE_OF}
        self._pool.tell()  # there is one more gateway
        try:
            while True:
                change = self._pool.change
                self._pool.want(waiting)
                await context.write(
                    WorkerList(workers=self._pool.listed(), gateways=self.gateways, cluster_id=self._cluster_id)
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LIST_S):  # wait_for can swallow a cancellation
                        await change.wait()
        finally:
            del self._watching[this]
            self._pool.tell()
