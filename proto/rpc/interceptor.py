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

from ..errors import Expired, InvalidRequest, IsthmusError
from .limits import REQUEST_S
from .statuses import status_of, status_of_bug
from .streams import Stalled

log = logging.getLogger(__name__)

Handler = Callable[[Any, grpc.aio.ServicerContext], Any]  # (request or iterator of requests, context)
Admit = Callable[[str, grpc.aio.ServicerContext], None]  # of a method, by its full name
Take = Callable[[grpc.aio.ServicerContext], Awaitable[Any]]  # what a handler is given of the calls' messages

# Where a handler is found, by whether requests and responses are streams.
_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Guards handlers of all four kinds.

    An IsthmusError becomes its status, bytes that are no request become INVALID_ARGUMENT, and any other exception is a
    bug: logged with its trace, UNKNOWN for the caller. Handlers of request streams take requests from their iterator.
    No handler runs, and no message is read, before `admit` lets the caller in.

    To gRPC all of them take streams, which is the same on the wire: it would wait for ever for a single request that is
    begun and not finished. Here each message must arrive within REQUEST_S, or the call is DEADLINE_EXCEEDED.
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
        behaviour: Handler = getattr(handler, _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)])
        guard = _guard_generator if inspect.isasyncgenfunction(behaviour) else _guard_coroutine
        take = _stream if handler.request_streaming else _single
        responses = grpc.stream_stream_rpc_method_handler
        make = responses if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        decode = _decoder(handler.request_deserializer or bytes, method)
        return make(guard(behaviour, take, method, self._admit), decode, handler.response_serializer)


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


async def _read(context: grpc.aio.ServicerContext) -> Any:
    """The next message, or EOF; raises what `_decoder` returned in its place, and Expired where it takes too long."""
    try:
        async with asyncio.timeout(REQUEST_S):
            request = await context.read()
    except TimeoutError:
        raise Expired(f"the request did not arrive within {REQUEST_S:g} s") from None
    if isinstance(request, InvalidRequest):
        raise request
    return request


async def _single(context: grpc.aio.ServicerContext) -> Any:
    if (request := await _read(context)) is grpc.aio.EOF:
        raise InvalidRequest("a call without a request")
    return request


async def _stream(context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
    async def requests() -> AsyncIterator[Any]:
        while (request := await _read(context)) is not grpc.aio.EOF:
            yield request

    return requests()


def _guard_coroutine(behaviour: Handler, take: Take, method: str, admit: Admit) -> Handler:
    """Wraps a handler that is a coroutine.

    Our streaming handlers are coroutines too and call `context.write`: a cancellation is then raised inside the
    handler, whereas an async generator that is suspended in a `yield` is only closed when it is collected.
    """

    async def guarded(_: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            admit(method, context)
            return await behaviour(await take(context), context)
        except Exception as error:
            await _end(error, method, context)

    return guarded


def _guard_generator(behaviour: Handler, take: Take, method: str, admit: Admit) -> Handler:
    """Wraps a handler that is an async generator, as gRPC's own reflection is."""

    async def guarded(_: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            admit(method, context)
            async with aclosing(behaviour(await take(context), context)) as responses:
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
