"""Heartbeats of a stream, where their reader is slow or gone."""

import asyncio

import pytest

from isthmus.proto.rpc.streams import Stalled, with_heartbeat


async def test_a_heartbeat_that_nobody_reads_ends_whatever_runs() -> None:
    async def write(message: str) -> None:
        await asyncio.sleep(0.05)
        raise Stalled("nothing was read")

    with pytest.raises(Stalled, match="nothing was read"):
        async with asyncio.timeout(20), with_heartbeat(write, lambda: "heartbeat", 0.01):
            await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None and not task.cancelling()


async def test_a_heartbeat_to_a_client_that_is_gone_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def write(message: str) -> None:
        raise RuntimeError("the call has ended")

    async with with_heartbeat(write, lambda: "heartbeat", 0.01):
        await asyncio.sleep(0.1)
    assert not caplog.records
