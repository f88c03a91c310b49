"""grpc.health.v1 of a server. That of grpcio-health-checking writes to a watcher under the lock that every change of
health needs: one watcher that does not read would hold up the server's drain and end."""

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from ..errors import Exhausted, NotFound
from .streams import write_in_time

LIVENESS = "liveness"  # a service that serves for as long as the process answers: what liveness probes ask for
MAX_WATCHERS = 256  # of one server: each holds a call for as long as it likes


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers probes, and tells watchers of each change as fast as they read; what they are late for is left out."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._changed = asyncio.Event()  # a new one after each change
        self._watchers = 0

    def set_serving(self, service: str, serving: bool) -> None:
        """Whether a service serves from now on; "" stands for all."""
        self._serving[service] = serving
        self._changed.set()
        self._changed = asyncio.Event()

    def serves(self, service: str) -> bool:
        """Whether a service of that name serves now."""
        return self._serving.get(service, False)

    async def Check(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> HealthCheckResponse:
        if request.service not in self._serving:
            raise NotFound("this server has no service of that name")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        if self._watchers >= MAX_WATCHERS:
            raise Exhausted(f"health is watched by {MAX_WATCHERS} clients already: ask Check now and then")
        self._watchers += 1
        try:
            told = None
            while True:
                changed, status = self._changed, self._status(request.service)
                if status != told:
                    await write_in_time(context, HealthCheckResponse(status=status))
                    told = status
                await changed.wait()
        finally:
            self._watchers -= 1

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus:
        if service not in self._serving:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._serving[service] else HealthCheckResponse.NOT_SERVING
