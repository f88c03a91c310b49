"""The guard around every handler of every server: errors become statuses, bytes that are no request are refused, and so
is who may not call."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..errors import InvalidRequest, IsthmusError
from .statuses import status_of, status_of_bug
from .streams import Stalled

log = logging.getLogger(__name__)

Handler = Callable[[Any, grpc.aio.ServicerContext], Any]  # (request or iterator of requests, context)
Admit = Callable[[str, grpc.aio.ServicerContext], None]  # of a method, by its full name

# By whether requests and responses are streams: where the handler is found, and what makes another one of its kind.
_KINDS = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Guards handlers of all four kinds.

    An IsthmusError becomes its status, bytes that are no request become INVALID_ARGUMENT, and any other exception is a
    bug: logged with its trace, UNKNOWN for the caller. Handlers of request streams take requests from their iterator.
    No handler runs before `admit` lets the caller in.
    """

    def __init__(self, admit: Admit | None = None) -> None:
        """`admit` raises what is wrong with a call's peer; None: anybody may call everything."""
        self._admit = admit or _everybody

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        kind, make = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        behaviour: Handler = getattr(handler, kind)
        guard = _guard_generator if inspect.isasyncgenfunction(behaviour) else _guard_coroutine
        requests, admit = _checked_stream if handler.request_streaming else _checked, self._admit
        decode = _decoder(handler.request_deserializer or bytes, method)
        return make(guard(behaviour, requests, method, admit), decode, handler.response_serializer)


def _everybody(method: str, context: grpc.aio.ServicerContext) -> None:
    pass


def _decoder(decode: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    """A deserializer that returns what is wrong: gRPC answers UNKNOWN where one raises."""

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return InvalidRequest(f"{len(data)} bytes that are no request of {method}")

    return decoded


def _checked(request: Any) -> Any:
    """The request; raises what `_decoder` returned in its place."""
    if isinstance(request, InvalidRequest):
        raise request
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _guard_coroutine(behaviour: Handler, requests: Callable[[Any], Any], method: str, admit: Admit) -> Handler:
    """Wraps a handler that is a coroutine.

    Our streaming handlers are coroutines too and call `context.write`: a cancellation is then raised inside the
    handler, whereas an async generator that is suspended in a `yield` is only closed when it is collected.
    """

    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            admit(method, context)
            return await behaviour(requests(request), context)
        except Exception as error:
            await _end(error, method, context)

    return guarded


def _guard_generator(behaviour: Handler, requests: Callable[[Any], Any], method: str, admit: Admit) -> Handler:
    """Wraps a handler that is an async generator, as gRPC's own reflection is."""

    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            admit(method, context)
            async with aclosing(behaviour(requests(request), context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _end(error, method, context)

    return guarded


async def _end(error: Exception, method: str, context: grpc.aio.ServicerContext) -> None:
    """Ends a call with the status of what its handler raised, or silently where nobody can be told."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, Stalled):
        log.warning("%s is ended: %s", method, error)
        raise asyncio.CancelledError from None
    if isinstance(error, grpc.aio.InternalError):  # what gRPC raises for a write to a call that has ended
        log.info("%s: whoever called is gone", method)
        raise asyncio.CancelledError from None
    if isinstance(error, IsthmusError):
        if error.private:
            log.warning("refused %s", method, extra={"fields": {"why": str(error), "private": error.private}})
        await context.abort(*status_of(error))
    await context.abort(*status_of_bug(error, method))
