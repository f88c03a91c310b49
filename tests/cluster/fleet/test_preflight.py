"""No worker is used before it has moved real pages; what is wrong with one is in the status, in one line."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from models import model_path
from scripted import Scripted, says, scripted_cluster

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.fleet import canary
from isthmus.cluster.fleet.canary import Canary
from isthmus.cluster.fleet.worker_table import Member
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.launch.role_host import RoleHost, settings_by_role
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.kvtransfer.codecs.registry import DEFAULT_CODEC
from isthmus.kvtransfer.receiver import KvReceiver
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_CHECKING,
    WORKER_HEALTH_INCOMPATIBLE,
    WORKER_HEALTH_READY,
    WORKER_HEALTH_UNFIT,
    WORKER_HEALTH_UNREACHABLE,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    WorkerReport,
)

MODEL = "tiny-llama"
REQUEST = build_request(token_ids=list(range(3, 300)), sampling={"temperature": 0, "max_tokens": 5, "ignore_eos": True})


async def worker(stack: AsyncExitStack, kind: type[PrefillWorker] | type[DecodeWorker], **changes: Any) -> str:
    """The address of a worker that runs until the stack is left."""
    settings = {"model": model_path(MODEL), "dtype": "fp32", "tls": "off", **changes}
    made = (
        PrefillWorker(PrefillConfig(**{"name": "prefill", **settings}))
        if kind is PrefillWorker
        else DecodeWorker(DecodeConfig(**{"name": "decode", **settings}))
    )
    await made.start()
    stack.push_async_callback(made.stop)
    return made.address


@asynccontextmanager
async def gateway_of(stack: AsyncExitStack, *addresses: str) -> AsyncIterator[Gateway]:
    gateway = Gateway("127.0.0.1:0", load_served_model(model_path(MODEL)), addresses)
    await gateway.start()
    stack.push_async_callback(gateway.stop)
    yield gateway


async def status_of(gateway: Gateway, name: str, *healths: int) -> WorkerReport:
    """The status of a worker once it has one of these healths."""
    async with asyncio.timeout(60):
        while True:
            change = gateway.fleet.change
            for status in gateway.fleet.statuses():
                if status.worker_id == name and status.health in healths:
                    return status
            try:
                async with asyncio.timeout(0.2):
                    await change.wait()
            except TimeoutError:
                continue


async def test_the_first_pair_verifies_each_other_and_then_serves() -> None:
    async with AsyncExitStack() as stack:
        addresses = [await worker(stack, PrefillWorker), await worker(stack, DecodeWorker)]
        async with gateway_of(stack, *addresses) as gateway, Client(gateway.address) as client:
            assert not gateway.fleet.table.routing.decode
            for name in ("prefill", "decode"):
                assert not (await status_of(gateway, name, WORKER_HEALTH_READY)).reason
            assert len((await client.answer(REQUEST)).token_ids) == 5


async def test_a_canary_waits_for_answers_whose_worker_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "MAX_DELAY_S", 120.0)  # longer than any wait here
    async with AsyncExitStack() as stack:
        first = [await worker(stack, PrefillWorker), await worker(stack, DecodeWorker)]
        async with gateway_of(stack, *first) as gateway:
            gateway.fleet.replays.begin("an answer")  # that nobody could go on with yet: it holds nothing up
            for name in ("prefill", "decode"):
                await status_of(gateway, name, WORKER_HEALTH_READY)
            gateway.fleet.add(await worker(stack, DecodeWorker, name="second"))
            await status_of(gateway, "second", WORKER_HEALTH_CHECKING)
            await asyncio.sleep(1.0)
            await status_of(gateway, "second", WORKER_HEALTH_CHECKING)
            gateway.fleet.replays.end("an answer")
            await status_of(gateway, "second", WORKER_HEALTH_READY)


async def test_a_flipped_worker_has_only_to_move_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    ask, asked = Canary._ask, list[tuple[str, bool]]()

    async def noted(self: Canary, decode: Member, codec: str, *more: Any) -> Any:
        asked.append((codec, bool(more[-1])))  # the prefill workers that it names
        return await ask(self, decode, codec, *more)

    monkeypatch.setattr(Canary, "_ask", noted)
    host = RoleHost(
        "decode",
        settings_by_role("decode", {"model": model_path(MODEL), "dtype": "fp32", "tls": "off", "name": "second"}),
    )
    async with AsyncExitStack() as stack:
        addresses = [await worker(stack, PrefillWorker), await worker(stack, DecodeWorker)]
        stack.push_async_callback(host.stop)
        await host.start()
        async with gateway_of(stack, *addresses, host.address) as gateway:
            for name in ("prefill", "decode", "second"):
                await status_of(gateway, name, WORKER_HEALTH_READY)
            assert ("raw", True) in asked
            for role in (WORKER_ROLE_PREFILL, WORKER_ROLE_DECODE):
                asked.clear()
                flipped = await gateway.operations.flip("second", role, 10)
                assert (flipped.role, flipped.health) == (role, WORKER_HEALTH_READY)
                assert sorted(asked) == [(DEFAULT_CODEC, False), (DEFAULT_CODEC, True)]


async def test_pages_that_decode_to_something_else_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides agree on everything, and still the KV that arrives is not what was sent."""
    decode = KvReceiver.decode

    def shifted(self: KvReceiver, section: Any, dtype: Any) -> Any:
        keys, values = decode(self, section, dtype)
        return keys, values.roll(1, 0)

    monkeypatch.setattr(KvReceiver, "decode", shifted)
    async with AsyncExitStack() as stack:
        addresses = [await worker(stack, PrefillWorker), await worker(stack, DecodeWorker)]
        async with gateway_of(stack, *addresses) as gateway:
            status = await status_of(gateway, "decode", WORKER_HEALTH_UNFIT)
            assert "its canary with prefill failed: with codec raw token" in status.reason
            assert "local computation says" in status.reason
            assert not gateway.fleet.table.routing.decode
            monkeypatch.undo()
            await status_of(gateway, "decode", WORKER_HEALTH_READY)  # tried again, and the fault is gone


async def test_a_prefill_worker_that_decode_workers_cannot_use_is_red() -> None:
    """The gateway sees its reports; its transfer port is of something else."""
    async with AsyncExitStack() as stack:
        addresses = [await worker(stack, PrefillWorker), await worker(stack, DecodeWorker)]
        async with gateway_of(stack, *addresses) as gateway:
            good = await status_of(gateway, "prefill", WORKER_HEALTH_READY)
            odd = Scripted(WorkerReport(), says("x"))
            odd.report.CopyFrom(good)
            odd.report.worker_id, odd.report.instance, odd.report.health = "odd", "new", WORKER_HEALTH_READY
            await odd.start()
            stack.push_async_callback(odd.stop)
            gateway.fleet.add(odd.address)
            status = await status_of(gateway, "odd", WORKER_HEALTH_UNFIT)
            assert status.reason.startswith(
                "its canary with decode failed: with codec raw: UNAVAILABLE: prefill worker"
            )
            assert "\n" not in status.reason
            assert [load.address for load in gateway.fleet.table.routing.prefill] == [addresses[0]]


@pytest.mark.parametrize(
    ("changes", "health", "words"),
    [
        ({"model": "tiny-qwen3"}, WORKER_HEALTH_INCOMPATIBLE, "runs model tiny-qwen3"),
        ({"page_tokens": 32}, WORKER_HEALTH_INCOMPATIBLE, "has pages of 32 tokens"),
        ({"codecs": ("fp8",), "default_codec": "fp8"}, WORKER_HEALTH_INCOMPATIBLE, "has codecs fp8; the decode"),
    ],
)
async def test_a_misconfigured_worker_is_red_and_the_others_serve(
    changes: dict[str, Any], health: int, words: str
) -> None:
    if "model" in changes:
        changes = {"model": model_path(changes["model"])}
    async with AsyncExitStack() as stack:
        addresses = [
            await worker(stack, PrefillWorker),
            await worker(stack, DecodeWorker, codecs=("raw", "tq-k4v4")),
            await worker(stack, PrefillWorker, name="odd", **changes),
        ]
        async with gateway_of(stack, *addresses) as gateway, Client(gateway.address) as client:
            status = await status_of(gateway, "odd", health)
            assert words in status.reason
            assert "\n" not in status.reason
            await status_of(gateway, "prefill", WORKER_HEALTH_READY)
            assert len((await client.answer(REQUEST)).token_ids) == 5
            assert [load.address for load in gateway.fleet.table.routing.prefill] == [addresses[0]]


async def test_an_address_where_nobody_is_stays_red() -> None:
    async with AsyncExitStack() as stack:
        addresses = [await worker(stack, PrefillWorker), await worker(stack, DecodeWorker), "127.0.0.1:1"]
        async with gateway_of(stack, *addresses) as gateway:
            await status_of(gateway, "prefill", WORKER_HEALTH_READY)
            status = await status_of(gateway, "127.0.0.1:1", WORKER_HEALTH_UNREACHABLE)
            assert status.reason.startswith("cannot be reached")


async def test_a_restarted_worker_is_checked_again() -> None:
    async def empty(request: DecodeRequest, context: object) -> None:
        """An answer with neither tokens nor pages."""

    async with scripted_cluster(says("hello"), preflight=True) as cluster:
        fleet, decode = cluster.gateway.fleet, cluster.decodes[0]
        async with asyncio.timeout(10):
            while not fleet.table.routing.decode:
                await asyncio.sleep(0.02)
        asked = len(decode.requests)
        decode.script = empty
        decode.report.instance = "started anew"
        decode.reports.changed()
        status = await status_of(cluster.gateway, "decode-0", WORKER_HEALTH_UNFIT)
        assert len(decode.requests) > asked
        assert "no page was moved" in status.reason
        assert not fleet.table.routing.decode
        decode.script = says("hello")
        await status_of(cluster.gateway, "decode-0", WORKER_HEALTH_READY)
