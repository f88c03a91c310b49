"""The gateway against workers that follow a script."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from raw_grpc import raw_call
from scripted import Script, Scripted, client_of, hangs, report_of, says, scripted_cluster, served

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.fleet.report import Report
from isthmus.cluster.fleet.worker_entry import WorkerEntry
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.kvtransfer.hashing import HASH_BYTES
from isthmus.proto.common_pb2 import FINISH_REASON_STOP
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.errors import Exhausted, InvalidRequest, IsthmusError, Unavailable
from isthmus.proto.generation_pb2 import GenerateEvent, ListModelsRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.rpc.statuses import RETRY_KEY
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_READY,
    WORKER_HEALTH_UNREACHABLE,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    DrainWorkerRequest,
    FlipWorkerRequest,
    ScaleRequest,
)


def raises(error: Exception) -> Script:
    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        raise error

    return script


async def until(worker: Scripted, cancelled: int) -> None:
    """Waits until a worker has seen so many cancellations."""
    async with asyncio.timeout(5):
        while worker.cancelled < cancelled:
            await asyncio.sleep(0.01)


async def test_an_answer_with_its_figures() -> None:
    async with scripted_cluster(says("hello")) as cluster, client_of(cluster.gateway) as client:
        answer = await client.answer(build_request(prompt="p" * 130, codec="raw", sampling={"seed": 5}))
        assert (answer.text, answer.finish, answer.token_ids) == ("hello", "length", list(b"hello"))
        assert (answer.usage.prompt_tokens, answer.usage.output_tokens) == (130, 5)
        assert (answer.timings.seed, answer.timings.transfer.kv_bytes_wire) == (5, 1000)
        assert answer.timings.decode_worker == cluster.decodes[0].address
        assert len(answer.itl_ms) == 4
        asked = cluster.decodes[0].requests[0]
        assert list(asked.prefill_addresses) == [cluster.prefill.address]
        assert (asked.codec, len(asked.page_hashes), asked.sampling.seed) == ("raw", 2 * HASH_BYTES, 5)
        assert asked.sampling.HasField("temperature")  # every default is set


async def test_the_first_token_is_passed_on_at_once() -> None:
    async with scripted_cluster(hangs) as cluster, client_of(cluster.gateway) as client:
        events = client.generate(build_request(prompt="x"))
        first = await asyncio.wait_for(anext(events), 2)
        assert first.text == "A"
        await events.aclose()
        await until(cluster.decodes[0], cancelled=1)
        async with asyncio.timeout(5):
            await cluster.gateway.load.wait_idle()


async def test_fifty_cancels_leave_nothing_behind() -> None:
    async with scripted_cluster(hangs) as cluster, client_of(cluster.gateway) as client:
        for _ in range(50):
            events = client.generate(build_request(prompt="x"))
            await anext(events)
            await events.aclose()
        await until(cluster.decodes[0], cancelled=50)
        async with asyncio.timeout(5):
            await cluster.gateway.load.wait_idle()


async def test_the_deadline_reaches_the_worker() -> None:
    left = []

    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        left.append(context.time_remaining())
        await hangs(request, context)

    async with scripted_cluster(script) as cluster, client_of(cluster.gateway) as client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(build_request(prompt="x"), timeout_s=2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0 < left[0] <= 2.1  # gRPC rounds it up
        await until(cluster.decodes[0], cancelled=1)


async def test_a_stop_string_across_tokens_cancels_the_worker() -> None:
    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        for token in b"one END two":
            await context.write(DecodeEvent(token_ids=[token]))
        await asyncio.Event().wait()

    async with scripted_cluster(script) as cluster, client_of(cluster.gateway) as client:
        answer = await client.answer(build_request(prompt="x", sampling={"stop": ["END"]}))
        assert (answer.text, answer.finish_reason) == ("one ", FINISH_REASON_STOP)
        assert answer.usage.output_tokens == len("one END")
        await until(cluster.decodes[0], cancelled=1)


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (InvalidRequest("too odd"), grpc.StatusCode.INVALID_ARGUMENT, "too odd"),
        (Exhausted("no pages"), grpc.StatusCode.RESOURCE_EXHAUSTED, "no pages"),
    ],
)
async def test_a_workers_error_is_the_clients(error: IsthmusError, code: grpc.StatusCode, details: str) -> None:
    async with scripted_cluster(raises(error)) as cluster, client_of(cluster.gateway) as client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(build_request(prompt="x"))
        assert (raised.value.code(), raised.value.details()) == (code, details)
        hints = [int(value) for key, value in raised.value.trailing_metadata() or () if key == RETRY_KEY]
        assert len(hints) == (code is grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert all(100 <= hint <= 10_000 for hint in hints)


async def test_a_workers_bug_is_not_explained_to_clients(caplog: pytest.LogCaptureFixture) -> None:
    async with scripted_cluster(raises(KeyError("secret"))) as cluster, client_of(cluster.gateway) as client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(build_request(prompt="x"))
        assert raised.value.code() is grpc.StatusCode.UNKNOWN
        assert "secret" not in (raised.value.details() or "")
    assert "a bug in /isthmus.v1.Generation/Generate" in caplog.text


@pytest.mark.parametrize("error", [Exhausted("full"), Unavailable("draining")])
async def test_before_the_first_token_another_worker_takes_over(error: IsthmusError) -> None:
    async with (
        scripted_cluster(raises(error), raises(error), says("fine")) as cluster,
        client_of(cluster.gateway) as client,
    ):
        for _ in range(3):
            assert (await client.answer(build_request(prompt="x"))).text == "fine"


async def test_a_message_over_the_limit() -> None:
    async with scripted_cluster(says("x")) as cluster, client_of(cluster.gateway) as client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(build_request(prompt="x" * (4 << 20)))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "4194304" in (raised.value.details() or "")


async def test_status_and_models() -> None:
    async with scripted_cluster(says("x")) as cluster, client_of(cluster.gateway) as client:
        status = await client.status()
        assert [(worker.worker_id, worker.health) for worker in status.workers] == [
            ("prefill-0", WORKER_HEALTH_READY),
            ("decode-0", WORKER_HEALTH_READY),
        ]
        model = await client.model("bytes")
        assert (list(model.codecs), model.default_codec) == (["raw", "tq-k4v4"], "tq-k4v4")
        assert (model.context_length, model.max_request_tokens, model.has_chat_template) == (1000, 1000, True)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.model("other")
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        async with Transport().dial(cluster.gateway.address) as channel:
            listed = await GenerationStub(channel).ListModels(ListModelsRequest())
        assert list(listed.models) == [model]


async def test_health_follows_the_workers() -> None:
    async with (
        scripted_cluster(says("x"), local_prefill="never") as cluster,
        Transport().dial(cluster.gateway.address) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="isthmus.v1.Generation"))
        async with asyncio.timeout(10):
            while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            await cluster.prefill.stop()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def listed(address: str) -> set[str]:
    """The services that a port says it has."""
    async with Transport().dial(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        await call.done_writing()
        return {service.name for service in reply.list_services_response.service} - {reflection.SERVICE_NAME}


async def test_clients_and_orders_have_a_port_each() -> None:
    async with scripted_cluster(says("x")) as cluster:
        gateway = cluster.gateway
        assert await listed(gateway.address) == {"isthmus.v1.Generation", "grpc.health.v1.Health"}
        assert await listed(gateway.admin_address) == {"isthmus.v1.Cluster", "grpc.health.v1.Health"}
        async with Client(gateway.address, admin=gateway.address) as client:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await client.status()
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        async with Client(gateway.address) as client:
            with pytest.raises(InvalidRequest, match="a port of their own"):
                await client.status()


async def test_orders_are_taken_in_plain_text_on_loopback_only() -> None:
    gateway = Gateway("127.0.0.1:0", served(), config=GatewayConfig(admin_listen="0.0.0.0:0"))
    with pytest.raises(InvalidRequest, match=r"gateway.admin_listen is 0.0.0.0:0: without TLS .* name a loopback"):
        await gateway.start()
    await gateway.stop()


async def test_a_worker_that_comes_back_is_used_again() -> None:
    async with scripted_cluster(says("one"), restart_wait_s=0.5) as cluster, client_of(cluster.gateway) as client:
        worker = cluster.decodes[0]
        address = worker.address
        await worker.stop()
        async with asyncio.timeout(5):
            while cluster.gateway.fleet.table.routing.decode:
                await cluster.gateway.fleet.change.wait()
        status = await client.status()
        assert [worker.health for worker in status.workers] == [WORKER_HEALTH_READY, WORKER_HEALTH_UNREACHABLE]
        assert status.workers[1].reason == "cannot be reached (no process there, or no way to it)"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(build_request(prompt="x"))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        await worker.start(address)
        async with asyncio.timeout(5):
            while not cluster.gateway.fleet.table.routing.decode:
                await cluster.gateway.fleet.change.wait()
        assert (await client.answer(build_request(prompt="x"))).text == "one"


async def test_draining_lets_running_requests_end() -> None:
    release = asyncio.Event()

    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await context.write(DecodeEvent(token_ids=[65]))
        await release.wait()
        await says("B")(request, context)

    async with scripted_cluster(script) as cluster, client_of(cluster.gateway) as client:
        running = asyncio.create_task(client.answer(build_request(prompt="x")))
        async with asyncio.timeout(5):
            while not cluster.decodes[0].requests:
                await asyncio.sleep(0.01)
        draining = asyncio.create_task(cluster.gateway.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            await client.answer(build_request(prompt="x"))
        release.set()
        assert await draining
        assert (await running).text == "AB"


async def test_draining_gives_up_in_time() -> None:
    async with scripted_cluster(hangs) as cluster, client_of(cluster.gateway) as client:
        running = asyncio.create_task(client.answer(build_request(prompt="x")))
        async with asyncio.timeout(5):
            while not cluster.decodes[0].requests:
                await asyncio.sleep(0.01)
        begun = time.monotonic()
        assert not await cluster.gateway.drain(0.2)
        assert time.monotonic() - begun < 2
        await cluster.gateway.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await running


async def test_health_is_red_before_new_requests_are_refused() -> None:
    async with (
        scripted_cluster(says("hello"), propagation_s=0.6) as cluster,
        client_of(cluster.gateway) as client,
        Transport().dial(cluster.gateway.address) as channel,
    ):
        draining = asyncio.create_task(cluster.gateway.drain(5))
        await asyncio.sleep(0.2)
        health: Any = health_pb2_grpc.HealthStub(channel)
        probe = await health.Check(health_pb2.HealthCheckRequest())
        assert probe.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await client.answer(build_request(prompt="x"))).text == "hello", "who does not know it yet is served"
        assert await draining
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            await client.answer(build_request(prompt="x"))


async def test_a_port_in_use_is_an_error() -> None:
    async with scripted_cluster(says("x")) as cluster:
        second = Gateway(cluster.gateway.address, served(), config=GatewayConfig(admin_listen="127.0.0.1:0"))
        with pytest.raises(OSError, match=r"cannot listen on .* in use"):
            await second.start()
        assert await second.drain(1)
        await second.stop()
        third = Gateway("127.0.0.1:0", served(), config=GatewayConfig(admin_listen=cluster.gateway.admin_address))
        with pytest.raises(OSError, match=r"cannot listen on .* in use.* \(from gateway.admin_listen\)"):
            await third.start()
        await third.stop()


@pytest.mark.parametrize(
    "header",
    [
        (b"grpc-timeout", b"99999999H"),
        (b"grpc-timeout", b"99999999S"),
        (b"traceparent", b"caf\xc3\xa9"),
        (b"traceparent", b"\xff\xfe"),
        (b"tracestate", b"a\x7fb"),
        (b"tracestate", b"z" * 513),
    ],
)
async def test_odd_headers_disturb_neither_the_request_nor_the_workers(header: tuple[bytes, bytes]) -> None:
    async with scripted_cluster(says("hello")) as cluster:
        request = build_request(prompt="x").SerializeToString()
        path = "/isthmus.v1.Generation/Generate"
        answer = await raw_call(cluster.gateway.address, path, request, (header,))
        assert "".join(GenerateEvent.FromString(event).text for event in answer.messages) == "hello"
        assert len(cluster.decodes[0].requests) == 1  # it was not placed again
        assert cluster.gateway.load.active == 0
        assert [load.suspect for load in cluster.gateway.fleet.table.routing.decode] == [False]


async def test_a_call_that_could_not_be_sent_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = (("tracestate", "a\x7fb"),)
    monkeypatch.setattr("isthmus.cluster.frontend.generation_service.trace_context", lambda context: trace)
    async with scripted_cluster(says("hello")) as cluster, client_of(cluster.gateway) as client:
        failed: list[str] = []
        monkeypatch.setattr(cluster.gateway.fleet, "failed", failed.append)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.answer(build_request(prompt="x"), timeout_s=10)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (failed, cluster.decodes[0].requests) == ([], [])


async def test_a_name_of_any_length_is_not_found() -> None:
    async with scripted_cluster(says("hello")) as cluster, client_of(cluster.gateway) as client:
        for name in ("😀" * 2000, "x" * 100_000, "%" * 5000, "\0" * 5000):
            for _ in range(5):  # gRPC refuses long details at random
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await client.model(name)
                assert raised.value.code() is grpc.StatusCode.NOT_FOUND
                assert (raised.value.details() or "").endswith(f"({len(name)} characters) here; available: bytes")


@pytest.mark.parametrize(
    ("method", "request_", "told"),
    [
        (
            "DrainWorker",
            DrainWorkerRequest(worker="decode-0", timeout_s=float("inf")),
            "timeout_s is inf; allowed: 0 to",
        ),
        ("DrainWorker", DrainWorkerRequest(worker="decode-0", timeout_s=1e10), "timeout_s is 1e+10; allowed: 0 to"),
        ("DrainWorker", DrainWorkerRequest(worker="decode-0", timeout_s=float("nan")), "timeout_s is nan; allowed"),
        ("FlipWorker", FlipWorkerRequest(worker="decode-0", role=1, timeout_s=-1), "timeout_s is -1; allowed"),
        ("Scale", ScaleRequest(decode=2, timeout_s=1e300), "timeout_s is 1e+300; allowed: 0 to 86400 seconds"),
        ("Scale", ScaleRequest(decode=(1 << 32) - 1), "decode is 4294967295; allowed: at most 1000 workers"),
        ("FlipWorker", FlipWorkerRequest(worker="decode-0", role=99), "role is 99; allowed: 1 (prefill), 2 (decode)"),  # pyright: ignore
        ("FlipWorker", FlipWorkerRequest(worker="decode-0"), "role is 0; allowed: 1 (prefill), 2 (decode)"),
    ],
)
async def test_orders_that_cannot_be_are_refused_by_name(method: str, request_: Any, told: str) -> None:
    async with scripted_cluster(says("hello")) as cluster, client_of(cluster.gateway) as client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await getattr(client.cluster, method)(request_)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (raised.value.details() or "").startswith(told)


async def test_clients_see_no_paths_of_the_workers() -> None:
    async with scripted_cluster(says("hello")) as cluster, client_of(cluster.gateway) as client:
        cluster.decodes[0].report.model.path = "/srv/models/secret"
        async with asyncio.timeout(5):
            while not any(status.model.path for status in cluster.gateway.fleet.statuses()):
                await asyncio.sleep(0.02)
        assert "/srv" not in str(await client.status())


@pytest.mark.parametrize(
    ("told", "dialled"),
    [
        ({"advertise": "10.0.0.7:7001", "address": "10.0.0.7:7001"}, "10.0.0.7:7001"),
        ({"address": "10.0.0.7:7001"}, "10.0.0.7:7001"),  # of all interfaces; the list's works on this host only
        ({"address": "127.0.0.1:7001"}, None),
        ({"address": "localhost:7001"}, None),
        ({"address": "0.0.0.0:7001"}, None),
        ({"address": "unix:/tmp/socket", "advertise": "xds:///worker"}, None),
        ({}, None),
    ],
)
async def test_decode_workers_dial_what_a_listed_worker_advertises(told: dict[str, str], dialled: str | None) -> None:
    async with scripted_cluster(says("x")) as cluster, client_of(cluster.gateway) as client:
        listed, before = cluster.prefill.address, cluster.gateway.fleet.change
        cluster.prefill.report = report_of(WORKER_ROLE_PREFILL, **told, instance="new")
        async with asyncio.timeout(10):
            await before.wait()
        await client.answer(build_request(prompt="p" * 130, codec="raw"))
        assert list(cluster.decodes[0].requests[-1].prefill_addresses) == [dialled or listed]
        assert cluster.gateway.fleet.statuses()[0].address == listed


def test_an_address_that_others_can_dial_is_kept() -> None:
    report = Report.from_pb(report_of(WORKER_ROLE_PREFILL, address="10.0.0.7:7001"))
    for listed in ("worker.example:7001", "10.0.0.8:7001", "[fd00::8]:7001"):
        assert WorkerEntry(listed, 0.0, report).peer_address == listed
    for listed in ("localhost:7001", "[::1]:7001", "127.0.0.1:7001", "0.0.0.0:7001"):
        assert WorkerEntry(listed, 0.0, report).peer_address == "10.0.0.7:7001"
    report = replace(report, advertise="nat.example:9")
    assert WorkerEntry("10.0.0.8:7001", 0.0, report).peer_address == "nat.example:9"


async def test_a_measured_link_is_that_of_the_worker_however_it_is_dialled() -> None:
    async with scripted_cluster(says("x")) as cluster:
        fleet, prefill, decode = cluster.gateway.fleet, cluster.prefill, cluster.decodes[0]
        prefill.report = report_of(WORKER_ROLE_PREFILL, advertise="10.0.0.7:7001", instance="new")
        links = {"10.0.0.7:7001": 5.0, "other:1": 7.0}
        decode.report = report_of(WORKER_ROLE_DECODE, link_bytes_per_ms=links, instance="new")
        async with asyncio.timeout(10):
            while fleet.table.routing.decode.loads[decode.address].links != {prefill.address: 5.0, "other:1": 7.0}:
                await fleet.change.wait()
