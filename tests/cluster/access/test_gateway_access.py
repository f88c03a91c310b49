"""A gateway that asks who calls: keys, tokens, tenants, limits, and what becomes of calls while keys change."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from keyed import Keys
from scripted import Script, ScriptedCluster, hangs, says, scripted_cluster

from isthmus.cluster.access import refusals
from isthmus.cluster.access.access import MAX_CREDENTIALS, REFRESH_S, Access, check_listen
from isthmus.cluster.access.key_file import KeyDocument, change
from isthmus.cluster.access.keys import new_key
from isthmus.cluster.access.settings import AccessSettings
from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from isthmus.proto.errors import InvalidRequest, Unauthenticated
from isthmus.proto.generation_pb2 import GenerateRequest, ListModelsRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.rpc.statuses import RETRY_KEY
from isthmus.proto.rpc.transport import Transport


@asynccontextmanager
async def guarded(keys: Keys, *scripts: Script, **settings: Any) -> AsyncIterator[ScriptedCluster]:
    """A gateway that lets in who has one of these keys."""
    access = AccessSettings(keys_file=str(keys.path))
    async with scripted_cluster(*(scripts or (says("hello"),)), access=access, **settings) as cluster:
        yield cluster


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json")


def asked(**fields: Any) -> GenerateRequest:
    request = build_request(prompt="p" * 10, sampling={"max_tokens": 5, "seed": 1})
    request.MergeFrom(GenerateRequest(**fields))
    return request


async def status_of(call: Any) -> tuple[str, str, dict[str, str]]:
    """How a call ends that fails: code, details, trailing metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = raised.value
    return error.code().name, error.details() or "", {k: str(v) for k, v in error.trailing_metadata() or ()}


async def answer(cluster: ScriptedCluster, key: str | None, request: GenerateRequest | None = None) -> str:
    async with Client(cluster.gateway.address, api_key=key) as client:
        return (await client.answer(request or asked(), timeout_s=10)).text


async def refusal(cluster: ScriptedCluster, key: str | None, request: GenerateRequest | None = None) -> tuple[str, str]:
    return (await status_of(answer(cluster, key, request)))[:2]


async def raw(cluster: ScriptedCluster, *values: str) -> tuple[str, str]:
    """ListModels with these authorization headers."""
    transport = Transport()
    try:
        stub: Any = GenerationStub(transport.dial(cluster.gateway.address))
        metadata = tuple(("authorization", value) for value in values)
        return (await status_of(stub.ListModels(ListModelsRequest(), metadata=metadata, timeout=10)))[:2]
    finally:
        await transport.close()


async def test_a_key_lets_in_and_its_tenant_goes_down(keys: Keys) -> None:
    key = keys.add("acme", max_priority="standard")
    async with guarded(keys) as cluster:
        assert await answer(cluster, key) == "hello"
        assert await answer(cluster, key, asked(tenant="acme")) == "hello"
        salts = [request.page_hashes for request in cluster.decodes[0].requests]
        assert len(salts) == 2
        code, why = await refusal(cluster, key, asked(tenant="other"))
        assert (code, why) == ("PERMISSION_DENIED", "you ask as another tenant ('other'); allowed: 'acme', or none")
        assert cluster.gateway.access.refused == {"tenant": 1}


async def test_two_tenants_share_no_page(keys: Keys) -> None:
    one, two, same = keys.add("one"), keys.add("two"), keys.add("one again", tenant="one")
    async with guarded(keys) as cluster:
        request = build_request(prompt="p" * 200, sampling={"max_tokens": 5, "seed": 1})
        for key in (one, two, same):
            await answer(cluster, key, request)
        hashes = [request.page_hashes for request in cluster.decodes[0].requests]
        assert hashes[0] != hashes[1]
        assert hashes[0] == hashes[2]


async def test_who_has_no_key_is_let_in_nowhere_but_to_health(keys: Keys) -> None:
    keys.add("acme")
    async with guarded(keys, jobs_db=f"sqlite:///{keys.path.parent / 'jobs.db'}") as cluster:
        methods = [f"/{service.full_name}/{method.name}" for service in _services() for method in service.methods]
        assert len(methods) == 10
        transport = Transport()
        channel = transport.dial(cluster.gateway.address)
        for method in [*methods, "/isthmus.v1.Cluster/GetStatus", "/no.such.Service/Method", "/x"]:
            code, why, _ = await status_of(channel.unary_unary(method)(b"", timeout=20))
            assert (code, why[:19]) == ("UNAUTHENTICATED", "no API key or token")
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflection.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=20
        )
        assert (await status_of(call.read()))[0] == "UNAUTHENTICATED"
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        await transport.close()


def _services() -> list[Any]:
    from isthmus.proto import generation_pb2, jobs_pb2

    return [generation_pb2.DESCRIPTOR.services_by_name["Generation"], jobs_pb2.DESCRIPTOR.services_by_name["Jobs"]]


async def test_reflection_is_for_who_has_a_key(keys: Keys) -> None:
    key = keys.add("acme")
    async with guarded(keys) as cluster:
        transport = Transport()
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(transport.dial(cluster.gateway.address))
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]), metadata=(("authorization", f"Bearer {key}"),))
        found = await call.read()
        assert "isthmus.v1.Generation" in [service.name for service in found.list_services_response.service]
        call.cancel()
        await transport.close()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ((), "no API key or token: send authorization: Bearer KEY"),
        (("",), "this is no key or token"),
        (("Bearer",), "this is no key or token"),
        (("Bearer ",), "this is no key or token"),
        (("Basic dXNlcjpwYXNz",), "this is no key or token"),
        (("KEY",), "this is no key or token"),
        (("Bearer KEY", "Bearer KEY"), "this is no key or token"),
        (("Bearer wrong",), "this is not a valid API key"),
        (("Bearer KEY KEY",), "this is not a valid API key"),
        (("BearerKEY",), "this is no key or token"),
        ((f"Bearer {'A' * (MAX_CREDENTIALS + 1)}",), "this is no key or token"),
    ],
)
async def test_headers_that_prove_nothing(keys: Keys, values: tuple[str, ...], why: str) -> None:
    key = keys.add("acme")
    async with guarded(keys) as cluster:
        code, details = await raw(cluster, *(value.replace("KEY", key) for value in values))
        assert (code, details.startswith(why)) == ("UNAUTHENTICATED", True), details
        assert key not in details


async def test_the_scheme_is_read_as_http_reads_it(keys: Keys) -> None:
    key = keys.add("acme")
    async with guarded(keys) as cluster:
        transport = Transport()
        stub: Any = GenerationStub(transport.dial(cluster.gateway.address))
        for value in (f"bearer {key}", f"BEARER  {key}"):
            found = await stub.ListModels(ListModelsRequest(), metadata=(("authorization", value),))
            assert found.models[0].name == "bytes"
        await transport.close()


async def test_huge_headers_are_refused_and_the_server_goes_on(keys: Keys) -> None:
    key = keys.add("acme")
    async with guarded(keys) as cluster:
        for size in (1 << 14, 1 << 17, 1 << 20):
            code, _ = await raw(cluster, "Bearer " + "A" * size)
            assert code in ("UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL")
        assert await answer(cluster, key) == "hello"


async def test_a_refused_call_is_not_read(keys: Keys) -> None:
    """Neither is it parsed: bytes that are no request would else be INVALID_ARGUMENT."""
    keys.add("acme")
    async with guarded(keys) as cluster:
        transport = Transport()
        call = transport.dial(cluster.gateway.address).unary_unary("/isthmus.v1.Generation/Generate")
        assert (await status_of(call(b"\xff" * (1 << 20), timeout=10)))[0] == "UNAUTHENTICATED"
        await transport.close()


async def test_keys_change_while_calls_run(keys: Keys) -> None:
    """A revoked key is refused from the next look on; what it has begun goes on to its end."""
    pace = asyncio.Event()

    async def script(request: Any, context: Any) -> None:
        await pace.wait()
        await says("hello")(request, context)

    first = keys.add("first")
    async with guarded(keys, script) as cluster:
        running = asyncio.create_task(answer(cluster, first))
        async with asyncio.timeout(5):
            while not cluster.decodes[0].requests:
                await asyncio.sleep(0.01)
        second = keys.add("second")
        revoked = keys.records["first"].model_copy(update={"revoked": keys.records["first"].created})
        change(keys.path, lambda _: KeyDocument(keys=(revoked, keys.records["second"])))
        await asyncio.sleep(2 * REFRESH_S)
        assert await refusal(cluster, first) == ("UNAUTHENTICATED", f"API key {revoked.id} is revoked")
        pace.set()
        assert await running == "hello"
        keys.path.write_text("")
        await asyncio.sleep(2 * REFRESH_S)
        assert await refusal(cluster, second) == (
            "UNAUTHENTICATED",
            "no API key is valid here now; `isthmus status` says why",
        )
        async with Client(cluster.gateway.address, admin=cluster.gateway.admin_address) as client:
            access = (await client.status()).access
        assert (list(access.problems), access.keys) == ([f"{keys.path} is empty"], 0)
        change(keys.path, lambda _: KeyDocument(keys=(keys.records["second"],)))
        await asyncio.sleep(2 * REFRESH_S)
        assert await answer(cluster, second) == "hello"


async def test_a_file_that_is_not_there_lets_nobody_in_until_it_is(
    keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    key, record = new_key("acme")
    async with guarded(keys) as cluster:
        assert (await refusal(cluster, key))[0] == "UNAUTHENTICATED"
        assert (await refusal(cluster, None))[0] == "UNAUTHENTICATED"
        assert cluster.gateway.access.refused == {"unreadable": 1, "missing": 1}
        (logged,) = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
        assert vars(logged)["fields"] == {"why": f"{keys.path} cannot be read: No such file or directory"}
        change(keys.path, lambda _: KeyDocument(keys=(record,)))
        await asyncio.sleep(2 * REFRESH_S)
        assert await answer(cluster, key) == "hello"


async def test_the_largest_priority(keys: Keys) -> None:
    batch, standard = keys.add("b", max_priority="batch"), keys.add("s", max_priority="standard")
    async with guarded(keys) as cluster:
        for key, priority in ((batch, 0), (batch, PRIORITY_BATCH), (standard, 0), (standard, PRIORITY_STANDARD)):
            assert await answer(cluster, key, asked(priority=priority)) == "hello"
        priorities = [request.priority for request in cluster.decodes[0].requests]
        assert priorities == [PRIORITY_BATCH, PRIORITY_BATCH, PRIORITY_STANDARD, PRIORITY_STANDARD]
        for key, priority, most in (
            (batch, PRIORITY_STANDARD, "batch"),
            (batch, PRIORITY_INTERACTIVE, "batch"),
            (standard, PRIORITY_INTERACTIVE, "standard"),
        ):
            code, why = await refusal(cluster, key, asked(priority=priority))
            assert (code, why) == ("PERMISSION_DENIED", f"your largest priority is {most}")
        assert (await refusal(cluster, standard, asked(priority=77)))[0] == "INVALID_ARGUMENT"


async def test_requests_a_minute_with_a_hint(keys: Keys) -> None:
    key, other = keys.add("acme", requests_per_min=3), keys.add("also acme", tenant="acme")
    async with guarded(keys) as cluster:
        for _ in range(3):
            await answer(cluster, key)
        code, why, metadata = await status_of(answer(cluster, key))
        assert (code, why) == ("RESOURCE_EXHAUSTED", "more than 3 requests a minute: try again later")
        assert 15_000 < int(metadata[RETRY_KEY]) <= 20_000
        assert await answer(cluster, other) == "hello"  # another key has its own
        assert cluster.gateway.access.refused == {"requests_per_min": 1}


async def test_tokens_a_minute_are_prompt_and_output(keys: Keys) -> None:
    key = keys.add("acme", tokens_per_min=100)
    async with guarded(keys) as cluster:
        for _ in range(5):  # 10 of the prompt and 5 of output each; 50 of output that may be are given back
            assert await answer(cluster, key, build_request(prompt="p" * 10, sampling={"max_tokens": 20})) == "hello"
        assert cluster.gateway.access.refused == {}
        code, why, metadata = await status_of(
            answer(cluster, key, build_request(prompt="p" * 10, sampling={"max_tokens": 60}))
        )
        assert (code, why) == ("RESOURCE_EXHAUSTED", "more than 100 tokens a minute: try again later")
        assert 20_000 < int(metadata[RETRY_KEY]) <= 27_000  # 45 of 100 are missing
        code, why = await refusal(cluster, key, build_request(prompt="p" * 10, sampling={"max_tokens": 91}))
        assert (code, why) == (
            "INVALID_ARGUMENT",
            "prompt and output come to 101 tokens; allowed for you: 100 a minute",
        )


async def test_tokens_of_a_refused_request_come_back(keys: Keys) -> None:
    key = keys.add("acme", tokens_per_min=100, max_request_tokens=50)
    async with guarded(keys) as cluster:
        for _ in range(5):
            code, why = await refusal(cluster, key, build_request(prompt="p" * 10, sampling={"max_tokens": 90}))
            assert (code, why) == ("INVALID_ARGUMENT", "prompt and output come to 100 tokens; allowed: 50")
        assert await answer(cluster, key) == "hello"


async def test_requests_at_once(keys: Keys) -> None:
    key, other = keys.add("acme", running=2), keys.add("web")
    async with guarded(keys, hangs) as cluster, Client(cluster.gateway.address, api_key=key) as client:
        streams = [client.generate(asked()) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        code, why, metadata = await status_of(client.answer(asked()))
        assert (code, why) == ("RESOURCE_EXHAUSTED", "2 of your requests run already; allowed: 2")
        assert RETRY_KEY in metadata
        async with Client(cluster.gateway.address, api_key=other) as somebody:
            stream = somebody.generate(asked())
            await anext(stream)
            await stream.aclose()
        await streams.pop().aclose()
        async with asyncio.timeout(5):
            while cluster.gateway.load.active > 1:
                await asyncio.sleep(0.01)
        stream = client.generate(asked())
        await anext(stream)
        for running in (stream, *streams):
            await running.aclose()


async def test_budgets_are_the_smaller_of_the_key_s_and_the_gateway_s(keys: Keys) -> None:
    wide, narrow = keys.add("w", max_request_tokens=500), keys.add("n", max_request_tokens=14, max_request_s=0.3)
    async with guarded(keys, hangs, max_request_tokens=100) as cluster:
        request = build_request(prompt="p" * 10, sampling={"max_tokens": 91})
        assert (await refusal(cluster, wide, request))[1].endswith("allowed: 100")
        assert (await refusal(cluster, narrow))[1].endswith("come to 15 tokens; allowed: 14")
        begun_s = time.monotonic()
        short = build_request(prompt="p" * 10, sampling={"max_tokens": 4})
        assert (await refusal(cluster, narrow, short))[0] == "DEADLINE_EXCEEDED"
        assert 0.2 < time.monotonic() - begun_s < 5


async def test_failures_are_counted_slowed_and_audited(
    keys: Keys, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "time", _Clock())  # no time passes between the failures
    key = keys.add("acme")
    caplog.set_level(logging.INFO, "isthmus.audit")
    async with guarded(keys) as cluster:
        wrong = f"{key[:-43]}{'A' * 43}"
        for _ in range(10):
            assert (await refusal(cluster, wrong))[0] == "UNAUTHENTICATED"
        begun_s = time.monotonic()
        slowed = asyncio.gather(*(refusal(cluster, wrong) for _ in range(5)))
        while cluster.gateway.access.refused["unknown"] < 15:
            await asyncio.sleep(0.01)
        assert await answer(cluster, key) == "hello"
        assert time.monotonic() - begun_s < 0.9  # who has a key does not wait with them
        await slowed
        assert time.monotonic() - begun_s >= 3
        audited = [vars(entry)["fields"] for entry in caplog.records if entry.name == "isthmus.audit"]
        assert len(audited) == 10  # the others are counted only
        assert audited[0] == {
            "event": "refused",
            "who": "127.0.0.1",
            "what": "/isthmus.v1.Generation/Generate",
            "reason": "unknown",
            "key_id": keys.records["acme"].id,
        }
        assert key not in json.dumps(audited)
        assert wrong not in json.dumps(audited)


class _Clock:
    @staticmethod
    def monotonic() -> float:
        return 0.0


async def test_weights_of_keys_are_those_of_the_queue(keys: Keys) -> None:
    """While one request runs, three of each key wait: the heavier key's go first."""
    gate, order = asyncio.Event(), list[str]()

    async def script(request: Any, context: Any) -> None:
        order.append(request.request_id)
        if request.request_id.startswith("first"):
            await gate.wait()
        await says("hello")(request, context)

    light, heavy = keys.add("light", weight=1), keys.add("heavy", weight=100)
    async with guarded(keys, script, overcommit=0.01) as cluster:  # 64 tokens at once
        big: dict[str, Any] = {"prompt": "p" * 60, "sampling": {"max_tokens": 4, "seed": 1}}

        def named(name: str) -> GenerateRequest:
            request = build_request(**big)
            request.request_id = name
            return request

        calls = [asyncio.create_task(answer(cluster, light, named("first")))]
        while not order:
            await asyncio.sleep(0.01)
        for number in range(3):
            for name, key in (("light", light), ("heavy", heavy)):
                calls.append(asyncio.create_task(answer(cluster, key, named(f"{name} {number}"))))
                await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(*calls)
        started = [name.partition(".")[0][:-2] for name in order[1:]]
        assert started == ["heavy", "heavy", "heavy", "light", "light", "light"]


async def test_without_keys_only_this_host_may_ask() -> None:
    for address in ("127.0.0.1:0", "[::1]:0", "localhost:0"):
        check_listen(AccessSettings(), address)
    for address in ("0.0.0.0:50051", "[::]:50051", "10.0.0.7:50051", "host.example:50051"):
        with pytest.raises(InvalidRequest, match="isthmus keys add"):
            check_listen(AccessSettings(), address)
        check_listen(AccessSettings(anonymous=True), address)
        check_listen(AccessSettings(keys_file="missing"), address)


async def test_a_gateway_does_not_start_for_everybody() -> None:
    from scripted import served

    gateway = Gateway("0.0.0.0:0", served())
    try:
        with pytest.raises(InvalidRequest, match=r"on 0\.0\.0\.0:0 everybody could ask"):
            await gateway.start()
    finally:
        await gateway.stop()


async def test_a_handler_without_a_caller_serves_nobody(keys: Keys) -> None:
    access = Access(AccessSettings(keys_file=str(keys.path)))
    with pytest.raises(Unauthenticated):
        access.caller()
    with pytest.raises(Unauthenticated):
        access.claimed("", PRIORITY_STANDARD)
    with pytest.raises(Unauthenticated):
        access.own_tenant()


async def test_status_says_who_may_ask(keys: Keys) -> None:
    keys.add("acme")
    async with guarded(keys) as cluster:
        await refusal(cluster, "wrong")
        async with Client(cluster.gateway.address, admin=cluster.gateway.admin_address) as client:
            status = await client.status()
        assert (status.access.mode, status.access.keys, dict(status.access.refused)) == ("keys", 1, {"unknown": 1})
        assert (list(status.access.problems), status.log_content) == ([], False)


@pytest.mark.parametrize(
    ("access", "mode"), [(AccessSettings(anonymous=True), "anonymous"), (AccessSettings(), "loopback")]
)
async def test_where_nobody_is_asked_who_calls(access: AccessSettings, mode: str) -> None:
    async with scripted_cluster(says("x"), access=access) as cluster:
        assert await answer(cluster, None, asked(tenant="whoever", priority=PRIORITY_INTERACTIVE)) == "x"
        assert await answer(cluster, "some-key") == "x"
        async with Client(cluster.gateway.address, admin=cluster.gateway.admin_address) as client:
            assert (await client.status()).access.mode == mode


async def test_calls_do_not_see_each_other_s_callers(keys: Keys) -> None:
    """Many at once on one connection: each answer is of its own tenant's pages."""
    names = [f"tenant-{number}" for number in range(20)]
    for name in names:
        keys.add(name)
    seen: list[str] = []

    async with guarded(keys) as cluster:
        original = cluster.gateway.generator.resolve

        async def resolve(request: GenerateRequest) -> Any:
            await asyncio.sleep(0.01)
            seen.append(f"{request.request_id} {request.tenant}")
            return await original(request)

        cluster.gateway.generator.resolve = resolve
        await asyncio.gather(*(answer(cluster, keys.keys[name], asked(request_id=name)) for name in names * 5))
    assert sorted(seen) == sorted(f"{name} {name}" for name in names * 5)
