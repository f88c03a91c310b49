"""The admin port: status and orders have a port of their own, apart from that of clients; and one for health probes."""

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from ...proto import worker_pb2
from ...proto.errors import InvalidRequest
from ...proto.rpc.addresses import parse_address
from ...proto.rpc.interceptor import ErrorInterceptor
from ...proto.rpc.server import Server, Services
from ...proto.rpc.transport import MIB, Transport

CLUSTER = worker_pb2.DESCRIPTOR.services_by_name["Cluster"]
MAX_MESSAGE_BYTES = 4 * MIB
LIVENESS = "liveness"  # what liveness probes ask for


async def listen_admin(transport: Transport, listen: str, services: Services, *, setting: str) -> Server:
    """Starts to serve at host:port; `setting` names where that was said, for errors.

    InvalidRequest where others than this host could dial it in plain text: anybody could drain workers there. OSError
    where the address cannot be bound.
    """
    if not parse_address(listen).is_loopback:
        raise InvalidRequest(
            f"{setting} is {listen}: without TLS anybody who reaches that address could stop workers; "
            "name a loopback address, as 127.0.0.1:50052"
        )
    try:
        server = await transport.listen(listen, services, max_request_bytes=MAX_MESSAGE_BYTES)
    except OSError as error:
        raise OSError(f"{error} (from {setting})") from None
    await server.set_serving(True)
    return server


async def listen_health(listen: str, health: HealthServicer) -> grpc.aio.Server:
    """Answers health probes alone, to anybody and in plain text: kubelets have no certificate. The service `liveness`
    serves for as long as the process answers. OSError where the address cannot be bound."""
    await health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}: the address is in use, or is not one of this host") from error
    await server.start()
    return server
