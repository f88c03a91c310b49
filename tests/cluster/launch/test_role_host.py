"""Whether a worker can take the other role, and what goes along when it does: real hosts, a small model."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from models import model_path

from isthmus.cluster.cli.main import run
from isthmus.cluster.config import CONFIG_OF, SHARED, ClusterConfig, Role, load_config
from isthmus.cluster.launch.role_host import RoleHost, settings_by_role
from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_READY,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    FlipRequest,
    GetReportRequest,
    WorkerReport,
)
from isthmus.proto.worker_pb2_grpc import WorkerStub
from isthmus.worker.server import Drained

ROLE = {"prefill": WORKER_ROLE_PREFILL, "decode": WORKER_ROLE_DECODE}
OTHER: dict[Role, Role] = {"prefill": "decode", "decode": "prefill"}
MODEL = ("--model", model_path("tiny-llama"), "--dtype", "float32")


def settings_of_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[Role, Mapping[str, Any]]:
    """The settings of both roles that `isthmus worker ...` gives its host."""
    given: list[dict[Role, Mapping[str, Any]]] = []

    class Host:
        def __init__(self, role: Role, settings: dict[Role, Mapping[str, Any]], *_: object) -> None:
            given.append(settings)
            self.drained = asyncio.Event()

    monkeypatch.setattr("isthmus.cluster.launch.role_host.RoleHost", Host)
    monkeypatch.setattr("isthmus.cluster.launch.foreground.run_service", lambda *_: 0)
    assert run(["worker", *arguments]) == 0
    return given[0]


@asynccontextmanager
async def hosted(role: Role, settings: dict[Role, Mapping[str, Any]]) -> AsyncIterator[tuple[RoleHost, Any]]:
    """A started host, and a stub for its worker."""
    host = RoleHost(role, settings)
    try:
        await host.start()
        channel = Transport().dial(host.address)
        yield host, WorkerStub(channel)
        await channel.close()
    finally:
        await host.stop()


async def report_as(stub: Any, wanted: Role) -> WorkerReport:
    """The report of the worker once it is ready in a role."""
    async with asyncio.timeout(30):
        while True:
            try:
                report = await stub.GetReport(GetReportRequest(), wait_for_ready=True)
                if (report.role, report.health) == (ROLE[wanted], WORKER_HEALTH_READY):
                    return report
            except grpc.aio.AioRpcError as error:  # between the two
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("flags", [(), ("--codec", "raw", "--name", "mine")], ids=["without flags", "with flags"])
async def test_a_worker_of_the_command_line_flips_and_back(
    role: Role, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        settings = settings_of_command(patched, role, *MODEL, *flags)
    async with hosted(role, settings) as (host, stub):
        address, before = host.address, await stub.GetReport(GetReportRequest())
        for wanted in (OTHER[role], role):
            await stub.Flip(FlipRequest(role=ROLE[wanted], timeout_s=1))
            report = await report_as(stub, wanted)
            assert (report.address, report.flip_failure) == (address, "")
            assert (report.default_codec, report.model.path) == (before.default_codec, before.model.path)
            if flags:
                assert (report.worker_id, report.default_codec) == ("mine", "raw")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_only_what_was_set_and_means_the_same_goes_along(role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = settings_of_command(monkeypatch, role, "--threads", "1")
    assert plain[OTHER[role]] == {"model": "smollm2-135m", "threads": 1, "listen": "127.0.0.1:0", "tls": "off"}
    monkeypatch.delenv("ISTHMUS_TLS")
    flags = {f"{role}_worker": {"chunk_tokens": 64, "pool_gib": 0.5, "codecs": ()}}
    settings = load_config(None, flags).process_settings(role, default_threads=2)
    other = settings_by_role(role, settings)[OTHER[role]]
    expected = {"model": "smollm2-135m", "threads": 2, "listen": "127.0.0.1:0", "pool_gib": 0.5, "codecs": ()}
    assert other == expected
    assert CONFIG_OF[OTHER[role]](**other).chunk_tokens == CONFIG_OF[OTHER[role]](model="x").chunk_tokens


def test_every_setting_of_both_roles_is_decided_on() -> None:
    both = set(CONFIG_OF["prefill"].model_fields) & set(CONFIG_OF["decode"].model_fields)
    assert both - SHARED == {"chunk_tokens"}, "means another thing in each role"
    assert both >= SHARED


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_under_up_each_role_has_its_own_settings(role: Role) -> None:
    config = ClusterConfig(
        prefill_worker=PrefillConfig(chunk_tokens=128), decode_worker=DecodeConfig(chunk_tokens=8, pool_gib=0.25)
    )
    both = {each: config.worker_settings(each, "w", "127.0.0.1:0", 1) for each in OTHER}
    given = settings_by_role(role, both[role], both[OTHER[role]])
    assert given == both
    assert [CONFIG_OF[each](**given[each]).chunk_tokens for each in ("prefill", "decode")] == [128, 8]


BAD = {
    "a setting": ({"chunk_tokens": None}, "chunk_tokens: Input should be a valid integer"),
    "a key": ({"max_bach": 3}, "unknown key 'max_bach'"),
    "a codec": ({"pool": "packed", "default_codec": "raw"}, "the packed pool cannot hold codec 'raw'"),
    "a file": ({"balance": "/no/such/file"}, "/no/such/file"),
    "a certificate": ({"tls": dict.fromkeys(("ca", "cert", "key"), "/no/such/file")}, "/no/such/file cannot be"),
}


@pytest.mark.parametrize(("changes", "reason"), BAD.values(), ids=BAD)
async def test_settings_that_do_not_work_are_told_before_anything_is_drained(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"model": model_path("tiny-llama"), "dtype": "fp32", "tls": "off"}

    async def drained(self: PrefillWorker, timeout_s: float) -> Drained:
        raise AssertionError("it was drained")

    monkeypatch.setattr("isthmus.worker.server.WorkerServer.drain", drained)
    async with hosted("prefill", {"prefill": shared, "decode": {**shared, **changes}}) as (_, stub):
        instance = (await stub.GetReport(GetReportRequest())).instance
        with pytest.raises(grpc.aio.AioRpcError, match="cannot become a decode worker") as caught:
            await stub.Flip(FlipRequest(role=WORKER_ROLE_DECODE))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert reason in (caught.value.details() or "")
        report = await stub.GetReport(GetReportRequest())
        assert (report.instance, report.role, report.health) == (instance, WORKER_ROLE_PREFILL, WORKER_HEALTH_READY)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_cannot_be_built_goes_on_in_its_role(role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"model": model_path("tiny-llama"), "dtype": "fp32", "tls": "off", "name": "mine"}

    async def no_room(self: object, model: object = None) -> None:
        raise MemoryError("no room for the pool")

    monkeypatch.setattr(DecodeWorker if role == "prefill" else PrefillWorker, "start", no_room)
    async with hosted(role, settings_by_role(role, shared)) as (host, stub):
        address, before = host.address, (await stub.GetReport(GetReportRequest())).instance
        await stub.Flip(FlipRequest(role=ROLE[OTHER[role]], timeout_s=1))
        async with asyncio.timeout(30):
            while (report := await report_as(stub, role)).instance == before:
                await asyncio.sleep(0.02)
        assert (report.flip_failure, report.address, report.worker_id) == ("no room for the pool", address, "mine")
        assert host.role == role
        assert host.address == address


async def test_a_flip_whose_caller_goes_away_is_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"model": model_path("tiny-llama"), "dtype": "fp32", "tls": "off"}
    async with hosted("prefill", settings_by_role("prefill", shared)) as (host, stub):
        begun, release = asyncio.Event(), asyncio.Event()

        async def slow(timeout_s: float) -> Drained:
            begun.set()
            await release.wait()
            return Drained(0, 0)

        monkeypatch.setattr(host.server._reports, "_drain", slow)
        call = stub.Flip(FlipRequest(role=WORKER_ROLE_DECODE))
        await begun.wait()
        call.cancel()
        await asyncio.sleep(0.1)  # for the worker to hear of it
        release.set()
        await report_as(stub, "decode")
