"""How one process, or one part of it, talks gRPC: whoever dials or listens does it through a transport that its owner
gives it.

transport = Transport()
server = await transport.listen("127.0.0.1:0", {SERVICE: add_servicer})
async with transport.dial("127.0.0.1:7001") as channel:
    ...
transport.open_channels  # those that are not closed yet
await transport.close()
"""

import asyncio
from collections.abc import Callable
from typing import Any, Self

import grpc
import grpc.aio

from .addresses import grpc_target
from .interceptor import ErrorInterceptor
from .limits import MAX_CALLS, SERVER_LIMITS, UNCOMPRESSED, connection_limit
from .server import Server, Services, add_services
from .timeouts import clamped

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


class Channel(grpc.aio.Channel):
    """A channel of a transport, which counts it until it is closed. Timeouts of its calls are clamped to what gRPC can
    count: no caller has to think of it."""

    def __init__(self, inner: grpc.aio.Channel, on_closed: Callable[["Channel"], None]) -> None:
        self._inner, self._on_closed = inner, on_closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Ends the calls that run, after `grace` seconds where that is given, and the connection."""
        await self._inner.close(grace)
        self._on_closed(self)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return _clamping(self._inner.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return _clamping(self._inner.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return _clamping(self._inner.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return _clamping(self._inner.stream_stream(*args, **options))


def _clamping(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda request=None, *, timeout=None, **rest: call(request, timeout=clamped(timeout), **rest)


class Transport:
    """Makes the servers and channels of its owner, in plain text. Servers end by their own `stop`."""

    def __init__(self) -> None:
        self._open: set[Channel] = set()

    @property
    def open_channels(self) -> int:
        """How many channels are not closed."""
        return len(self._open)

    def dial(self, address: str) -> Channel:
        """A channel to "host:port"; connects lazily and reconnects by itself. Whoever dials closes it."""
        inner = grpc.aio.insecure_channel(grpc_target(address), options=list(_OPTIONS.items()))
        channel = Channel(inner, self._open.discard)
        self._open.add(channel)
        return channel

    async def listen(self, address: str, services: Services, *, max_request_bytes: int = FRAME_MESSAGE_LIMIT) -> Server:
        """Starts a server on "host:port" (port 0 picks one), not yet serving for health probes.

        OSError where the address cannot be bound.
        """
        options = {**_OPTIONS, **_SERVER_OPTIONS, "grpc.max_receive_message_length": max_request_bytes}
        options["grpc.max_allowed_incoming_connections"] = connection_limit()
        grpc_server = grpc.aio.server(
            interceptors=[ErrorInterceptor()], options=list(options.items()), maximum_concurrent_rpcs=MAX_CALLS
        )
        health = add_services(grpc_server, services)
        try:
            port = grpc_server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: the address is in use, or is not one of this host") from error
        await grpc_server.start()
        names = tuple(descriptor.full_name for descriptor in services)
        server = Server(grpc_server=grpc_server, health=health, port=port, services=names)
        await server.set_serving(False)
        return server

    async def close(self) -> None:
        """Closes the channels that are still open."""
        await asyncio.gather(*(channel.close() for channel in tuple(self._open)))
