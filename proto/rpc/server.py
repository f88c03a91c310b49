"""A started gRPC server: health for each service, reflection, and an end that is bounded in time."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .health import HealthServicer

log = logging.getLogger(__name__)

_STOP_LIMIT_S = 5.0

Services = Mapping[ServiceDescriptor, Callable[[grpc.aio.Server], None]]  # each with the call that adds its servicer


@dataclass(kw_only=True)
class Server:
    """A started server; `health` tells probes about each service by its full name."""

    grpc_server: grpc.aio.Server
    health: HealthServicer
    port: int
    services: tuple[str, ...]
    _stopping: asyncio.Future[None] | None = field(default=None, init=False)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the server: new calls are refused, running ones cancelled after the first stop's `grace_s`.

        grpc.aio was seen to wait for ever where a call's deadline passed as it arrived: this gives up on it. It is told
        to stop once only: of two that stop a server at the same time, the later one cancels the calls of a server that
        is gone by then, and the process dies (grpcio 1.85.1, its cancel_all_calls of a null pointer).
        """
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self.grpc_server.stop(grace_s))
        done, _ = await asyncio.wait([self._stopping], timeout=grace_s + _STOP_LIMIT_S)
        if not done:
            log.warning("the server on port %d did not end within %.0f s", self.port, _STOP_LIMIT_S)

    async def set_serving(self, serving: bool, *, but: Collection[str] = ()) -> None:
        """Answers health probes for every service of this server, and for the empty name, which stands for all.

        The services `but` do not serve in any case.
        """
        for name in ("", *self.services):
            self.health.set_serving(name, serving and name not in but and (name != "" or not but))


def add_services(server: grpc.aio.Server, services: Services) -> HealthServicer:
    """Adds services to a server that is not started, and health and reflection for them; returns the health."""
    for add in services.values():
        add(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [descriptor.full_name for descriptor in services]
    known = (*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(known, server)
    return health
