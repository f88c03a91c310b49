"""How one process, or one part of it, talks gRPC: whoever dials or listens does it through a transport that its owner
gives it.

transport = Transport(security)  # Transport() talks in plain text
server = await transport.listen("127.0.0.1:0", {SERVICE: add_servicer})
async with transport.dial("127.0.0.1:7001", "prefill") as channel:
    ...
transport.open_channels  # those that are not closed yet
await transport.close()
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from ..security.authority import Authority
from ..security.credentials import Security
from ..security.identity import ServerName
from .addresses import grpc_target
from .aio_server import aio_server
from .channel import Channel
from .health import LIVENESS, HealthServicer
from .interceptor import Admit, ErrorInterceptor
from .limits import MAX_CALLS, SERVER_LIMITS, UNCOMPRESSED, connection_limit
from .server import Server, Services, add_services

MIB = 1 << 20
FRAME_MESSAGE_LIMIT = 16 * MIB  # a frame is at most 4 MiB, but a page of a large model may not split further

_OPTIONS: dict[str, Any] = {
    "grpc.max_receive_message_length": FRAME_MESSAGE_LIMIT,
    "grpc.max_send_message_length": FRAME_MESSAGE_LIMIT,
    # A dead peer is noticed within seconds even where no byte is under way.
    "grpc.keepalive_time_ms": 5_000,
    "grpc.keepalive_timeout_ms": 15_000,  # of a machine that is busy, not gone
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 250,
    **UNCOMPRESSED,
}
_SERVER_OPTIONS: dict[str, Any] = {
    "grpc.so_reuseport": 0,  # a port in use is an error, not a silent share
    "grpc.http2.min_ping_interval_without_data_ms": 1_000,
    **SERVER_LIMITS,
}
# A connection is as old as the certificates that it began with: peers are asked to make another one, and where a peer
# must have a certificate, the old one ends.
_AGE_OPTIONS: dict[str, Any] = {"grpc.max_connection_age_ms": 600_000}
_GRACE_OPTIONS: dict[str, Any] = {"grpc.max_connection_age_grace_ms": 3_600_000}  # for answers that go on
_PROBE_BYTES = 4096  # of a request for somebody's health


class Transport:
    """Makes the servers and channels of its owner: with `security` encrypted, each side sure of the other; without, in
    plain text. Servers end by their own `stop`."""

    def __init__(self, security: Security | None = None) -> None:
        self.security = security
        self._open: set[Channel] = set()

    @property
    def open_channels(self) -> int:
        """How many channels are not closed."""
        return len(self._open)

    def dial(self, address: str, role: ServerName | None = None) -> Channel:
        """A channel to "host:port"; connects lazily and reconnects by itself. Whoever dials closes it.

        With certificates of a cluster only a server of its own that has this `role` is believed, wherever it runs; else
        one whose certificate names the host that is dialled.
        """
        channel = Channel(partial(self._connect, address, role), self._open.discard)
        self._open.add(channel)
        return channel

    @property
    def encrypted(self) -> bool:
        """Whether what goes through its channels can be read by nobody on the way."""
        return self.security is not None

    def _connect(self, address: str, role: ServerName | None, have: int) -> tuple[int, grpc.aio.Channel] | None:
        options = dict(_OPTIONS)
        if self.security is None:
            if have >= 0:
                return None
            return 0, grpc.aio.insecure_channel(grpc_target(address), options=list(options.items()))
        version, _ = self.security.current()
        if version == have:
            return None
        version, credentials = self.security.channel_credentials()
        if name := self.security.expected_name(role):
            options["grpc.ssl_target_name_override"] = name
        return version, grpc.aio.secure_channel(grpc_target(address), credentials, options=list(options.items()))

    async def listen(
        self,
        address: str,
        services: Services,
        *,
        max_request_bytes: int = FRAME_MESSAGE_LIMIT,
        client_certificates: bool = True,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> Server:
        """Starts a server on "host:port" (port 0 picks one), not yet serving for health probes.

        With certificates it checks who calls by the table of `security/authority.py`, and asks each peer for a
        certificate, unless `client_certificates` is False: then who shows none is anybody. `interceptors` come after
        that check and the one that makes statuses of errors.

        OSError where the address cannot be bound.
        """
        options = {**_OPTIONS, **_SERVER_OPTIONS, "grpc.max_receive_message_length": max_request_bytes}
        options["grpc.max_allowed_incoming_connections"] = connection_limit()
        security = self.security
        admit: Admit | None = None
        if security is not None:
            admit = Authority(security.cluster).check
            options |= _AGE_OPTIONS
            if client_certificates:  # else nobody's certificate has to end with the connection, and no answer either
                options |= _GRACE_OPTIONS
        grpc_server = aio_server(
            interceptors=[ErrorInterceptor(admit), *interceptors],
            options=list(options.items()),
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        health = add_services(grpc_server, services)
        credentials = None
        if security is not None:
            credentials = security.server_credentials(require_client_certificate=client_certificates)
        port = _bind(grpc_server, address, credentials)
        await grpc_server.start()
        names = tuple(descriptor.full_name for descriptor in services)
        server = Server(grpc_server=grpc_server, health=health, port=port, services=names)
        await server.set_serving(False)
        return server

    async def listen_health(self, address: str, health: HealthServicer) -> Server:
        """Starts a server that answers health probes alone, to anybody and in plain text: for kubelets, which have no
        certificate. `health`: of the server whose health it tells; the service LIVENESS serves always.

        OSError where the address cannot be bound.
        """
        health.set_serving(LIVENESS, True)
        options = {**_OPTIONS, **_SERVER_OPTIONS, "grpc.max_receive_message_length": _PROBE_BYTES}
        options["grpc.max_allowed_incoming_connections"] = connection_limit()
        grpc_server = aio_server(
            interceptors=[ErrorInterceptor()], options=list(options.items()), maximum_concurrent_rpcs=MAX_CALLS
        )
        health_pb2_grpc.add_HealthServicer_to_server(health, grpc_server)
        port = _bind(grpc_server, address, None)
        await grpc_server.start()
        return Server(grpc_server=grpc_server, health=health, port=port, services=())

    async def close(self) -> None:
        """Closes the channels that are still open."""
        await asyncio.gather(*(channel.close() for channel in tuple(self._open)))


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: the address is in use, or is not one of this host") from error
