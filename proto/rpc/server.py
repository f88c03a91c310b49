"""A gRPC server as all of ours are: limits, errors mapped to status codes, health per service, reflection."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from ..errors import Expired, InvalidRequest, IsthmusError, status_of
from .addresses import grpc_target
from .timeouts import clamp_calls

log = logging.getLogger(__name__)

MIB = 1 << 20
FRAME_MESSAGE_LIMIT = 16 * MIB  # a frame is at most 4 MiB, but a page of a large model may not split further

BUG = "internal error"  # how the details of a status begin that stands for a bug of the server
INVALID_METADATA = "Invalid metadata"  # gRPC's details beside INTERNAL, of a call that it refused to send
_LAST_WRITE_S = 2.0  # for a message that is under way when its handler is cancelled
_STOP_LIMIT_S = 5.0
_MAX_DETAILS = 2000  # bytes as encoded; details travel as a header, and gRPC refuses 8 KiB of them at random
_MAX_TRACE = 512  # bytes of a value of the trace context

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", FRAME_MESSAGE_LIMIT),
    ("grpc.max_send_message_length", FRAME_MESSAGE_LIMIT),
    # A dead peer is noticed within seconds even where no byte is under way.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 15_000),  # of a machine that is busy, not gone
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 250),
]


TraceContext = tuple[tuple[str, str], ...]
_TRACE_KEYS = ("traceparent", "tracestate")


def trace_context(context: grpc.aio.ServicerContext) -> TraceContext:
    """The caller's W3C trace context, as metadata for the next hop: the first value of each key that may be one.

    A server takes any bytes as a value, but a client that sends them on fails, with a status that reads as if the
    other side were broken.
    """
    found: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if key in _TRACE_KEYS and isinstance(value, str) and _is_trace(value):
            found.setdefault(key, value)
    return tuple(found.items())


def _is_trace(value: str) -> bool:
    return 1 <= len(value) <= _MAX_TRACE and value.isascii() and value.isprintable()


STALL_S = 60.0  # that a caller may take nothing of what is written to it


class Stalled(Expired):
    """Whoever called reads nothing. It cannot be told: a status would wait behind what it does not read."""


async def write_in_time(context: grpc.aio.ServicerContext, message: Any) -> None:
    """Writes to a stream; Stalled where its reader takes nothing for STALL_S: what it holds is wanted by others.

    A cancellation waits a moment for the message: gRPC sends no status beside one, and the caller would hear nothing.
    """
    writing = asyncio.ensure_future(context.write(message))
    writing.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with asyncio.timeout(STALL_S):
            await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing], timeout=_LAST_WRITE_S)
        raise
    except TimeoutError:
        writing.cancel()
        raise Stalled(f"nothing was read from this stream for {STALL_S:g} s") from None


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns an IsthmusError of any handler into its status, bytes that are no request into INVALID_ARGUMENT; logs
    anything else with its trace."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        codecs = (_decoder(handler.request_deserializer, method), handler.response_serializer)
        if handler.request_streaming:  # reflection is the only such service
            return grpc.stream_stream_rpc_method_handler(_guard_stream(handler.stream_stream, method), *codecs)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_guard(handler.unary_stream, method), *codecs)
        return grpc.unary_unary_rpc_method_handler(_guard(handler.unary_unary, method), *codecs)


def _decoder(decode: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    """A deserializer that returns what is wrong: gRPC answers UNKNOWN where one raises."""

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return InvalidRequest(f"{len(data)} bytes that are no request of {method}")

    return decoded


def _guard(behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    """Wraps a handler that is a coroutine.

    Streaming handlers are coroutines too and call `context.write`: a cancellation is then raised inside the
    handler, whereas an async generator that is suspended in a `yield` is only closed when it is collected.
    """

    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(_checked(request), context)
        except Stalled as error:
            log.warning("%s is ended: %s", method, error)
            raise asyncio.CancelledError from None
        except Exception as error:
            await _abort(error, method, context)

    return guarded


def _guard_stream(behaviour: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., AsyncIterator[Any]]:
    """Wraps a handler of request streams that is an async generator."""

    async def guarded(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async for response in behaviour((_checked(request) async for request in requests), context):
                yield response
        except Exception as error:
            await _abort(error, method, context)

    return guarded


def _checked(request: Any) -> Any:
    if isinstance(request, InvalidRequest):
        raise request
    return request


async def _abort(error: Exception, method: str, context: grpc.aio.ServicerContext) -> None:
    """Ends a call with the status of an error; of a bug the caller learns nothing but where the log tells of it."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, grpc.aio.InternalError):  # what gRPC raises for a write to a call that has ended
        log.info("%s: whoever called is gone", method)
        raise asyncio.CancelledError from None
    if isinstance(error, IsthmusError):
        if error.private:
            log.warning("refused %s", method, extra={"fields": {"why": str(error), "private": error.private}})
        metadata = (*(context.trailing_metadata() or ()), *error.metadata())
        await context.abort(status_of(error), cut(str(error)), metadata)
    await context.abort(grpc.StatusCode.UNKNOWN, note_bug(method, error))


def note_bug(where: str, error: Exception) -> str:
    """Logs a bug with its trace; returns what its caller is told: where to find that in the log, and nothing else."""
    incident = secrets.token_hex(4)
    log.error("a bug in %s, incident %s", where, incident, exc_info=error)
    return f"{BUG}, incident {incident}: the server's log tells more"


def cut(details: str, most: int = _MAX_DETAILS) -> str:
    """The details of a status, cut to what they may take on the wire, where all but printable ASCII is `%XX` bytes."""
    size = 0
    for at, character in enumerate(details):
        plain = " " <= character <= "~" and character != "%"
        size += 1 if plain else 3 * len(character.encode(errors="replace"))
        if size > most:
            return details[:at]
    return details


@dataclass(frozen=True, kw_only=True)
class Server:
    """A started server; `health` tells probes about each service by its full name."""

    grpc_server: grpc.aio.Server
    health: HealthServicer
    port: int
    services: tuple[str, ...]

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the server: new calls are refused, running ones cancelled after `grace_s`.

        grpc.aio was seen to wait for ever where a call's deadline passed as it arrived: this gives up on it.
        """
        stopping = asyncio.ensure_future(self.grpc_server.stop(grace_s))
        done, _ = await asyncio.wait([stopping], timeout=grace_s + _STOP_LIMIT_S)
        if not done:
            log.warning("the server on port %d did not end within %.0f s", self.port, _STOP_LIMIT_S)

    async def set_serving(self, serving: bool, *, but: Collection[str] = ()) -> None:
        """Answers health probes for every service of this server, and for the empty name, which stands for all.

        The services `but` do not serve in any case.
        """
        status = health_pb2.HealthCheckResponse
        for name in ("", *self.services):
            serves = serving and name not in but and (name != "" or not but)
            await self.health.set(name, status.SERVING if serves else status.NOT_SERVING)


async def start_server(
    listen: str,
    services: dict[ServiceDescriptor, Callable[[grpc.aio.Server], None]],
    *,
    max_request_bytes: int = FRAME_MESSAGE_LIMIT,
) -> Server:
    """Starts a server on `listen` ("host:port"; port 0 picks one), not yet serving for health probes.

    `services` maps each service to the call that adds its servicer. OSError where the address cannot be bound.
    """
    options = [
        *(option for option in CHANNEL_OPTIONS if option[0] != "grpc.max_receive_message_length"),
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a silent share
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ]
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=options)
    for add in services.values():
        add(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = tuple(descriptor.full_name for descriptor in services)
    known = (*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(known, server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}: the address is in use, or is not one of this host") from error
    await server.start()
    running = Server(grpc_server=server, health=health, port=port, services=names)
    await running.set_serving(False)
    return running


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to a worker or gateway at "host:port"; connects lazily and reconnects by itself.

    Timeouts of its calls are clamped to what gRPC can count.
    """
    return clamp_calls(grpc.aio.insecure_channel(grpc_target(address), options=CHANNEL_OPTIONS))
