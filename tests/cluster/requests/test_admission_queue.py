"""Requests that wait at the gateway: one runs at a time here."""

import asyncio

import grpc
import grpc.aio
import pytest
from scripted import Script, says, scripted_cluster

from isthmus.cluster.client.client import Client, build_request
from isthmus.proto.common_pb2 import (
    FINISH_REASON_LENGTH,
    PRIORITY_BATCH,
    PRIORITY_INTERACTIVE,
    PRIORITY_STANDARD,
    Priority,
    TokenLogprobs,
    TopLogprob,
)
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.rpc import streams
from isthmus.proto.rpc.statuses import RETRY_KEY
from isthmus.proto.worker_pb2 import PrefillRate, StepRate

ONE = {"overcommit": 0.05, "local_prefill": "never"}  # of 6,400 tokens: room for one request of 257 and no other


def waits_for(release: asyncio.Event) -> Script:
    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await release.wait()
        await context.write(DecodeEvent(token_ids=[65], finish_reason=FINISH_REASON_LENGTH))

    return script


def request_of(priority: Priority.ValueType, tenant: str = "") -> GenerateRequest:
    request = build_request(prompt="x")
    request.priority, request.tenant = priority, tenant
    return request


async def test_batch_yields_to_interactive_and_a_full_queue_refuses() -> None:
    release = asyncio.Event()
    async with (
        scripted_cluster(waits_for(release), max_waiting=1, **ONE) as cluster,
        Client(cluster.gateway.address) as client,
    ):
        running = [asyncio.create_task(client.answer(request_of(PRIORITY_STANDARD, "first")))]
        async with asyncio.timeout(5):
            while not cluster.decodes[0].requests:
                await asyncio.sleep(0.01)
        for priority in (PRIORITY_BATCH, PRIORITY_INTERACTIVE):
            running.append(asyncio.create_task(client.answer(request_of(priority))))
            async with asyncio.timeout(5):
                while cluster.gateway.load.active < len(running):
                    await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(request_of(PRIORITY_BATCH))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert RETRY_KEY in dict(raised.value.trailing_metadata() or ())
        assert len(cluster.decodes[0].requests) == 1
        release.set()
        await asyncio.gather(*running)
        ran = [request.priority for request in cluster.decodes[0].requests]
        assert ran == [PRIORITY_STANDARD, PRIORITY_INTERACTIVE, PRIORITY_BATCH]


async def test_one_that_is_cancelled_while_it_waits_holds_nothing() -> None:
    release = asyncio.Event()
    async with scripted_cluster(waits_for(release), **ONE) as cluster, Client(cluster.gateway.address) as client:
        running = asyncio.create_task(client.answer(request_of(PRIORITY_STANDARD)))
        async with asyncio.timeout(5):
            while not cluster.decodes[0].requests:
                await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(request_of(PRIORITY_STANDARD), timeout_s=0.3)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        release.set()
        await running
        assert (await client.answer(request_of(PRIORITY_STANDARD))).text == "A"
        assert len(cluster.decodes[0].requests) == 2


async def test_a_deadline_before_the_first_token_is_refused_at_once() -> None:
    async with (
        scripted_cluster(says("hi"), local_prefill="never") as cluster,
        Client(cluster.gateway.address) as client,
    ):
        cluster.prefill.report.prefill_rate.CopyFrom(PrefillRate(ms=0, ms_per_token=10, ms_per_token_ktoken=0))
        cluster.decodes[0].report.step_rate.CopyFrom(StepRate(ms=1, ms_per_sequence=0, ms_per_page=0))
        cluster.prefill.report.waiting_tokens = 1000  # 10 s
        table = cluster.gateway.fleet.table.routing
        async with asyncio.timeout(5):
            while not table.measured or not table.prefill.queued.max() >= 1000:
                await asyncio.sleep(0.01)
        for prompt, helps in (("x" * 100, True), ("x" * 600, False)):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await client.answer(build_request(prompt=prompt), timeout_s=5.0)
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "not begun" in (raised.value.details() or "")
            hints = [int(value) for key, value in raised.value.trailing_metadata() or () if key == RETRY_KEY]
            assert [5000 < hint < 6500 for hint in hints] == [True] * helps  # 11 s of which there are 5
        assert not cluster.decodes[0].requests
        assert (await client.answer(build_request(prompt="x" * 100), timeout_s=60.0)).text == "hi"
        assert (await client.answer(build_request(prompt="x" * 600))).text == "hi"


async def test_budgets_of_a_request() -> None:
    never = waits_for(asyncio.Event())
    settings = {"max_request_tokens": 300, "max_request_kv_mib": 2.0, "max_request_s": 0.3}
    async with scripted_cluster(never, **settings) as cluster, Client(cluster.gateway.address) as client:
        for prompt, code, details in (
            ("x" * 100, grpc.StatusCode.INVALID_ARGUMENT, "356 tokens; allowed: 300"),
            ("x", grpc.StatusCode.INVALID_ARGUMENT, "MiB of KV; allowed: 2"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await client.answer(build_request(prompt=prompt))
            assert raised.value.code() is code
            assert details in (raised.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(build_request(prompt="x", sampling={"max_tokens": 10}))
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_reads_nothing_is_ended_and_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALL_S", 0.5)

    ended = asyncio.Event()

    async def floods(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        event = DecodeEvent(token_ids=[65], logprobs=[TokenLogprobs(top=[TopLogprob(token_id=1)] * 50_000)])
        try:
            for _ in range(500):  # far more than any buffer on the way
                await context.write(event)
        finally:
            ended.set()

    # As little as gRPC can be told to read ahead of its caller.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with (
        scripted_cluster(floods, **ONE) as cluster,
        grpc.aio.insecure_channel(cluster.gateway.address, options=options) as channel,
    ):
        queue = cluster.gateway.generator._admission._queue
        call = GenerationStub(channel).Generate(build_request(prompt="x", sampling={"max_tokens": 600}))
        async with asyncio.timeout(60):
            while not queue.running_tokens:
                await asyncio.sleep(0.01)
            await ended.wait()
            while queue.running_tokens or cluster.gateway.load.active:
                await asyncio.sleep(0.01)
        assert not call.done(), "its client is still there, and would have held its place for ever"
        call.cancel()
