"""Channels of a transport are counted until they are closed."""

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from isthmus.proto import worker_pb2
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.worker_pb2 import WatchRequest
from isthmus.proto.worker_pb2_grpc import WorkerServicer, WorkerStub, add_WorkerServicer_to_server


class Silent(WorkerServicer):
    """Answers nothing."""

    def __init__(self) -> None:
        self.called, self.ended = asyncio.Event(), asyncio.Event()

    async def Watch(self, request: WatchRequest, context: Any) -> None:
        self.called.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()


async def test_a_channel_counts_until_it_is_closed() -> None:
    transport = Transport()
    async with transport.dial("127.0.0.1:9"):
        other = transport.dial("127.0.0.1:9")
        assert transport.open_channels == 2
    assert transport.open_channels == 1
    for _ in range(2):
        await other.close()
        assert transport.open_channels == 0


async def test_what_is_left_open_is_closed_with_the_calls_on_it() -> None:
    transport, servicer = Transport(), Silent()
    service = worker_pb2.DESCRIPTOR.services_by_name["Worker"]
    server = await transport.listen(
        "127.0.0.1:0", {service: lambda server: add_WorkerServicer_to_server(servicer, server)}
    )
    try:
        channels = [transport.dial(f"127.0.0.1:{server.port}") for _ in range(3)]
        call: Any = WorkerStub(channels[0]).Watch(WatchRequest())
        async with asyncio.timeout(20):
            await servicer.called.wait()
            await transport.close()
            assert transport.open_channels == 0
            assert {channel.get_state() for channel in channels} == {grpc.ChannelConnectivity.SHUTDOWN}
            assert await call.code() is grpc.StatusCode.CANCELLED
            await servicer.ended.wait()
    finally:
        await server.stop()


async def test_a_port_in_use_is_an_error() -> None:
    transport = Transport()
    server = await transport.listen("127.0.0.1:0", {})
    try:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            await transport.listen(f"127.0.0.1:{server.port}", {})
    finally:
        await server.stop()


def test_nothing_else_opens_channels_or_servers() -> None:
    root = Path(__file__).parents[3]
    folders = [folder for folder in root.iterdir() if folder.is_dir() and folder.name not in ("tests", ".venv")]
    product = (path for folder in folders for path in folder.rglob("*.py"))
    opens = re.compile(r"secure_channel\(|grpc\.(aio\.)?server\(|[^_]aio_server\(|grpc\.(aio\.)?Channel\(")
    found = [path.relative_to(root).as_posix() for path in product if opens.search(path.read_text())]
    # The others: hostile peers, and sockets that only the same user of the same host may open.
    hostile = ["benchmarks/fuzzing/certificates.py", "benchmarks/fuzzing/fleet.py"]
    own = ["cluster/launch/local_drain.py", "cluster/launch/local_orders.py"]
    assert sorted(found) == [*hostile, *own, "proto/rpc/aio_server.py", "proto/rpc/transport.py"]
