"""The admin port: status and orders have a port of their own, apart from that of clients."""

from ...proto import worker_pb2
from ...proto.errors import InvalidRequest
from ...proto.rpc.addresses import parse_address
from ...proto.rpc.server import Server, Services
from ...proto.rpc.transport import MIB, Transport
from ..logs.admin import AdminAudit

CLUSTER = worker_pb2.DESCRIPTOR.services_by_name["Cluster"]
MAX_MESSAGE_BYTES = 4 * MIB


async def listen_admin(transport: Transport, listen: str, services: Services, *, setting: str) -> Server:
    """Starts to serve at host:port; `setting` names where that was said, for errors.

    InvalidRequest where others than this host could dial it in plain text: anybody could drain workers there. OSError
    where the address cannot be bound.
    """
    if transport.security is None and not parse_address(listen).is_loopback:
        raise InvalidRequest(
            f"{setting} is {listen}: without TLS anybody who reaches that address could stop workers; "
            "name a loopback address, as 127.0.0.1:50052"
        )
    try:
        server = await transport.listen(
            listen, services, max_request_bytes=MAX_MESSAGE_BYTES, interceptors=[AdminAudit()]
        )
    except OSError as error:
        raise OSError(f"{error} (from {setting})") from None
    await server.set_serving(True)
    return server
