"""What a server takes of its peers at most."""

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from support.raw_grpc import PREFACE, connect, opening

from isthmus.proto.rpc import health, limits, transport
from isthmus.proto.rpc.limits import connection_limit
from isthmus.proto.rpc.transport import Transport

CHECK = HealthCheckRequest()


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    server = await Transport().listen("127.0.0.1:0", {})
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop()


def health_of(channel: grpc.aio.Channel) -> Any:
    return HealthStub(channel)


@pytest.fixture
def descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_connections_beyond_the_limit_are_closed_and_others_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "connection_limit", lambda: 20)
    async with served() as address, Transport().dial(address) as channel:
        await health_of(channel).Check(CHECK)
        opened = [await connect(address) for _ in range(40)]
        await asyncio.sleep(0.5)
        ended = [reader.at_eof() or reader.exception() is not None for reader, _ in opened]
        assert sum(ended) >= 20
        await health_of(channel).Check(CHECK)
        for _, writer in opened:
            writer.transport.abort()
        async with asyncio.timeout(10), Transport().dial(address) as other:  # there is room again
            await health_of(other).Check(CHECK, wait_for_ready=True)


@pytest.mark.parametrize("begun", [b"", PREFACE, opening()])
async def test_a_connection_that_does_not_finish_its_handshake_is_closed(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc.server_handshake_timeout_ms", "grpc.http2.settings_timeout"):
        monkeypatch.setitem(transport._SERVER_OPTIONS, name, 300)
    async with served() as address, asyncio.timeout(10):
        reader, writer = await connect(address)
        writer.write(begun)
        with suppress(ConnectionResetError):
            while await reader.read(1 << 16):
                continue
        writer.close()


async def test_a_connection_without_calls_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transport._SERVER_OPTIONS, "grpc.max_connection_idle_ms", 300)
    async with served() as address, Transport().dial(address) as channel, asyncio.timeout(10):
        await health_of(channel).Check(CHECK)
        while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)
        await health_of(channel).Check(CHECK)  # its client connects again


async def test_calls_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_CALLS", 5)
    async with served() as address, Transport().dial(address) as channel:
        watching: list[Any] = [health_of(channel).Watch(CHECK) for _ in range(5)]
        for call in watching:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(channel).Check(CHECK)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watching[0].cancel()
        async with asyncio.timeout(10):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    await health_of(channel).Check(CHECK)
                    break
        for call in watching:
            call.cancel()


async def test_watchers_of_health_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHERS", 2)
    async with served() as address, Transport().dial(address) as channel:
        watching: list[Any] = [health_of(channel).Watch(CHECK) for _ in range(2)]
        for call in watching:
            assert (await call.read()).status == HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(channel).Watch(CHECK).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watching[0].cancel()
        async with asyncio.timeout(10):
            while True:
                again: Any = health_of(channel).Watch(CHECK)
                with suppress(grpc.aio.AioRpcError):
                    await again.read()
                    break
        for call in (*watching, again):
            call.cancel()


@pytest.mark.usefixtures("descriptors")
def test_connections_are_bounded_by_what_the_process_may_open() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    assert connection_limit() == min(limits.MAX_CONNECTIONS, hard // 2)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
