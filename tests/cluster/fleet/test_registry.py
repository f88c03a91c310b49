"""The set of watched workers while it changes."""

import asyncio
import logging

import pytest
from certified import security, transport
from support.certificates import CLUSTER

from isthmus.cluster.fleet.compatibility import Requirements
from isthmus.cluster.fleet.registry import Fleet
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.certificates import make_ca
from isthmus.proto.worker_pb2 import WORKER_HEALTH_DRAINING, WORKER_HEALTH_READY, WorkerHealth, WorkerReport

NOBODY = "127.0.0.1:9"


async def test_a_worker_that_is_added_while_another_leaves_its_address_stays() -> None:
    transport = Transport()
    fleet = Fleet(Requirements(protocol_version=PROTOCOL_VERSION, model="m", fingerprint="f"), transport)
    fleet.add(NOBODY)
    before = fleet.channel(NOBODY)
    await asyncio.sleep(0.05)  # its stream is under way
    removing = asyncio.create_task(fleet.remove(NOBODY))
    await asyncio.sleep(0)
    fleet.add(NOBODY)
    after, stream = fleet.channel(NOBODY), fleet._streams[NOBODY]
    await removing
    assert fleet.channel(NOBODY) is after is not before
    assert transport.open_channels == 1
    await asyncio.sleep(0.05)
    assert not stream.done()
    assert after.get_state(try_to_connect=True).name != "SHUTDOWN"
    await fleet.close()
    assert not fleet._channels and not fleet._streams and not fleet._calls
    assert transport.open_channels == 0


async def test_nothing_is_kept_of_a_worker_that_left() -> None:
    fleet = Fleet(Requirements(protocol_version=PROTOCOL_VERSION, model="m", fingerprint="f"), Transport())
    fleet.add(NOBODY)
    for outliers in fleet.table._outliers.values():
        outliers.add(NOBODY)
    await fleet.remove(NOBODY)
    assert fleet.statuses() == []
    assert [outliers._records for outliers in fleet.table._outliers.values()] == [{}, {}]
    await fleet.close()


@pytest.mark.parametrize(
    ("last", "logged"),
    [
        (WORKER_HEALTH_READY, [(logging.WARNING, "lost a worker")]),
        (WORKER_HEALTH_DRAINING, [(logging.INFO, "a worker left")]),  # drained, or flipped
    ],
)
async def test_only_a_worker_that_was_not_told_to_leave_is_lost(
    last: WorkerHealth.ValueType, logged: list[tuple[int, str]], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet(Requirements(protocol_version=PROTOCOL_VERSION, model="m", fingerprint="f"), Transport())
    fleet.add(NOBODY)
    fleet._reports[NOBODY] = WorkerReport(health=last)
    fleet.table._entries[NOBODY].problem = ""  # it was up
    with caplog.at_level(logging.INFO, "isthmus.cluster.fleet.registry"):
        fleet._lost(NOBODY, "ended its report stream")
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == logged
    await fleet.close()


async def test_why_there_is_no_encrypted_connection_is_told() -> None:
    """Not that nobody is there: an operator would look for a process that runs."""
    server = await Transport(security(make_ca(CLUSTER), "decode")).listen("127.0.0.1:0", {})
    fleet = Fleet(
        Requirements(protocol_version=PROTOCOL_VERSION, model="m", fingerprint="f"),
        transport(make_ca(CLUSTER), "gateway"),
    )
    fleet.add(f"127.0.0.1:{server.port}")
    async with asyncio.timeout(10):
        while "none of the CAs" not in fleet.statuses()[0].reason:
            await asyncio.sleep(0.05)
    assert fleet.statuses()[0].reason.startswith("answers, but ")
    await fleet.close()
    await server.stop()
