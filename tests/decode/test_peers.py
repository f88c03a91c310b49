"""Channels to prefill workers are closed once they are not used."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from isthmus.decode import transfer
from isthmus.decode.transfer import PrefillPeers
from isthmus.proto.rpc.transport import Transport


async def test_so_many_channels_stay_open_with_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "IDLE_PEERS", 3)
    transport = Transport()
    peers = PrefillPeers(transport)
    async with peers.calling("127.0.0.1:1") as first, AsyncExitStack() as others:
        for port in range(2, 12):
            await others.enter_async_context(peers.calling(f"127.0.0.1:{port}"))
        assert len(peers) == transport.open_channels == 11, "all of them are used"
        await others.aclose()
        assert list(peers._peers) == ["127.0.0.1:1", *(f"127.0.0.1:{port}" for port in (9, 10, 11))]
        async with peers.calling("127.0.0.1:1") as again:
            assert type(again) is type(first)
            assert peers._peers["127.0.0.1:1"].calls == 2
    assert len(peers) == transport.open_channels == 3
    kept = [peer.channel for peer in peers._peers.values()]
    await peers.close()
    assert len(peers) == transport.open_channels == 0
    assert [channel.get_state().name for channel in kept] == ["SHUTDOWN"] * 3


async def test_a_channel_that_is_used_again_is_the_same() -> None:
    peers = PrefillPeers(Transport())
    for _ in range(2):
        async with peers.calling("127.0.0.1:1"):
            await asyncio.sleep(0)
        assert len(peers) == 1
    await peers.close()
