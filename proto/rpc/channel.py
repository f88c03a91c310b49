"""A channel of a transport: counted until it is closed, its timeouts clamped, its connection made anew where the
certificates have changed."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import grpc
import grpc.aio

from .timeouts import clamped

Connect = Callable[[int], tuple[int, grpc.aio.Channel] | None]


@dataclass(eq=False)
class _Connection:
    """gRPC's own channel, with the credentials of one version."""

    version: int
    inner: grpc.aio.Channel
    calls: int = 0  # that run
    retired: bool = False  # new calls use another one


class Channel(grpc.aio.Channel):
    """Timeouts of its calls are clamped to what gRPC can count: no caller has to think of it.

    Where certificates have changed, the next call connects anew; calls in flight finish on the old connection.
    """

    def __init__(self, connect: Connect, on_closed: Callable[["Channel"], None]) -> None:
        """`connect`: from the version of certificates that is used now, to a newer one and a channel of gRPC with it;
        None where there is no newer one."""
        first = connect(-1)
        assert first is not None
        self._connect, self._on_closed = connect, on_closed
        self._now = _Connection(*first)
        self._old: set[_Connection] = set()
        self._closing: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Ends the calls that run, after `grace` seconds where that is given, and the connection."""
        old, self._old = self._old, set()
        await asyncio.gather(*(each.inner.close(grace) for each in (self._now, *old)), *self._closing)
        self._on_closed(self)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._now.inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._now.inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._now.inner.channel_ready()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._method("unary_unary", args, options)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._method("unary_stream", args, options)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._method("stream_unary", args, options)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._method("stream_stream", args, options)

    def _method(self, kind: str, args: Any, options: Any) -> Callable[..., Any]:
        """What a stub calls; made anew for each connection."""
        made: tuple[_Connection, Callable[..., Any]] | None = None

        def call(request: Any = None, *, timeout: float | None = None, **rest: Any) -> Any:
            nonlocal made
            connection = self._current()
            if made is None or made[0] is not connection:
                made = connection, getattr(connection.inner, kind)(*args, **options)
            running = made[1](request, timeout=clamped(timeout), **rest)
            connection.calls += 1
            running.add_done_callback(lambda _: self._ended(connection))
            return running

        return call

    def _current(self) -> _Connection:
        newer = self._connect(self._now.version)
        if newer is not None:
            old, self._now = self._now, _Connection(*newer)
            old.retired = True
            self._old.add(old)
            if not old.calls:
                self._close(old)
        return self._now

    def _ended(self, connection: _Connection) -> None:
        connection.calls -= 1
        if connection.retired and not connection.calls and connection in self._old:
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        self._old.discard(connection)
        closing = asyncio.ensure_future(connection.inner.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
