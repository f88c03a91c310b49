"""A response of server-sent events: begins with the first event, ends with `[DONE]`, and never waits for long."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...proto.errors import Unavailable
from ...proto.rpc.streams import STALL_S, Stalled
from .call import Call
from .errors import ClientGone, Dialect, problem_of

log = logging.getLogger(__name__)

COMMENT = b": nothing new\n\n"
SILENCE_S = 10.0  # after which a stream gets a comment
DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # of nginx
}
_LAST_WORD_S = 1.0  # for the error of a stream that the server ends

Write = Callable[[bytes], Awaitable[None]]


def data(text: str, name: str = "") -> bytes:
    """An event with this JSON; `name`: of events that have one."""
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {text}\n\n".encode()


def error_event(error: Exception, dialect: Dialect) -> bytes:
    """The event that ends a stream that has failed: it has a name, and the object that any answer has of an error."""
    return data(json.dumps(dialect.error_body(problem_of(error))), "error")


class EventStream(Response):
    """What a handler returns for a stream: `produce` makes its events, and returns after the last one."""

    def __init__(
        self,
        call: Call,
        produce: Callable[[Write], Awaitable[None]],
        *,
        last: bytes = DONE,
        failed: Callable[[Exception, Dialect], bytes] = error_event,
        alive: bytes = COMMENT,
    ) -> None:
        """`produce` is given what to write events with, within `Call.alive`; nothing (b"") is `alive` where there was
        silence for SILENCE_S. An error before the first event is answered with its status, a later one by the event of
        `failed`, and no `last`."""
        self._call, self._produce, self._last, self._failed = call, produce, last, failed
        self._alive = alive
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = _Writer(self._call, send, self._alive)
        try:
            await self._run(write)
        except Stalled as error:
            log.warning("a stream is ended: %s", error)
            raise ClientGone from None

    async def _run(self, write: "_Writer") -> None:
        end = self._last
        try:
            async with self._call.alive():
                await self._produce(write)
        except (Stalled, ClientGone):
            raise
        except asyncio.CancelledError:  # the server stops
            if write.started:
                with contextlib.suppress(TimeoutError, Stalled):
                    async with asyncio.timeout(_LAST_WORD_S):
                        await write(self._failed(Unavailable("the gateway stops"), self._call.dialect))
            raise
        except Exception as error:
            if not write.started:
                raise
            end = self._failed(error, self._call.dialect)
        await write(end)
        await write.end()


class _Writer:
    """Writes the events of one stream; several tasks may."""

    def __init__(self, call: Call, send: Send, alive: bytes) -> None:
        self._call, self._send, self._alive = call, send, alive
        self._one_at_once, self._last_s = asyncio.Lock(), call.arrived_s
        self.started = False

    async def __call__(self, event: bytes) -> None:
        """Stalled where the client has taken nothing for STALL_S and no more of it may wait here."""
        if not event:
            if time.monotonic() - self._last_s < SILENCE_S:
                return
            event = self._alive
        try:
            async with self._one_at_once, asyncio.timeout(STALL_S):
                if not self.started:
                    await self._start()
                await self._send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:
            raise Stalled(f"nothing was read from this stream for {STALL_S:g} s") from None
        self._last_s = time.monotonic()

    async def end(self) -> None:
        """After the last event."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self) -> None:
        headers = {**_HEADERS, **self._call.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        self.started = True
