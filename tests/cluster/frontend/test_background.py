"""Each loop of the gateway raises what it should not: it goes on, or the service turns red."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted import Scripted, client_of, report_of, says, scripted_cluster, served

from isthmus.cluster.client.client import build_request
from isthmus.cluster.fleet.canary import Canary
from isthmus.cluster.fleet.canary_schedule import CanarySchedule
from isthmus.cluster.fleet.registry import Fleet
from isthmus.cluster.fleet.worker_entry import WorkerEntry
from isthmus.cluster.fleet.worker_table import WorkerTable
from isthmus.cluster.frontend import gateway as gateway_module
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.proto import tasks as tasks_module
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL


class Raises:
    """Has a method raise a few times before it does what it did."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, times: int = 1) -> None:
        self.left = times
        genuine = getattr(owner, name)

        def raising(*args: Any, **kwargs: Any) -> Any:
            if self.left:
                self.left -= 1
                raise ValueError("boom")
            return genuine(*args, **kwargs)

        patch.setattr(owner, name, raising)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("owner", "method", "task"),
    [
        (Fleet, "_check", "look for silent workers"),
        (WorkerEntry, "update", "watch a worker"),
        (WorkerTable, "_refresh", "watch a worker"),
        (gateway_module, "servable_codecs", "health"),
    ],
)
async def test_a_loop_of_the_gateway_goes_on(
    monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, task: str
) -> None:
    raises = Raises(monkeypatch, owner, method)
    async with scripted_cluster(says("hello")) as cluster, client_of(cluster.gateway) as client:
        await until(lambda: not raises.left and cluster.gateway.ready.is_set())
        assert (await client.answer(build_request(prompt="x"), timeout_s=20)).text == "hello"
        status = await client.status()
        assert dict(status.task_failures) == {task: 1}
        assert list(status.failing) == []
        assert [worker.reason for worker in status.workers] == ["", ""]


@pytest.mark.parametrize(
    ("owner", "method", "task"), [(CanarySchedule, "due", "preflight"), (Canary, "check", "canary")]
)
async def test_the_preflight_goes_on(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, task: str) -> None:
    judged: list[str | None] = []
    monkeypatch.setattr(Fleet, "judge", lambda self, report, unfit: judged.append(unfit))
    Raises(monkeypatch, owner, method)
    async with gateway_with_preflight() as gateway:
        await until(lambda: judged and "a bug of the gateway" not in str(judged[-1]))
        assert gateway.failures == {task: 1}
        assert any("a bug of the gateway (ValueError)" in str(reason) for reason in judged) == (method == "check")


@asynccontextmanager
async def gateway_with_preflight() -> AsyncIterator[Gateway]:
    """Over two scripted workers, which move no pages: no canary succeeds."""
    workers = [Scripted(report_of(WORKER_ROLE_PREFILL)), Scripted(report_of(WORKER_ROLE_DECODE), says("x"))]
    for worker in workers:
        await worker.start()
    gateway = Gateway("127.0.0.1:0", served(), [worker.address for worker in workers])
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()
        for worker in workers:
            await worker.stop()


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(request)).status


async def test_a_loop_that_fails_again_and_again_turns_the_gateway_red(monkeypatch: pytest.MonkeyPatch) -> None:
    raises = Raises(monkeypatch, Fleet, "_check", times=1_000_000)
    monkeypatch.setattr(tasks_module, "LAST_PAUSE_S", 0.1)
    monkeypatch.setattr(gateway_module, "HEALTH_PERIOD_S", 0.05)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with (
        scripted_cluster(says("hello")) as cluster,
        Transport().dial(cluster.gateway.address) as channel,
        client_of(cluster.gateway) as client,
    ):
        async with asyncio.timeout(30):
            while await health(channel) != not_serving or await health(channel, "isthmus.v1.Generation") != not_serving:
                await asyncio.sleep(0.02)
        status = await client.status()
        assert list(status.failing) == ["look for silent workers"]
        assert status.task_failures["look for silent workers"] >= tasks_module.PATIENCE
        raises.left = 0
        monkeypatch.setattr(tasks_module, "STEADY_S", 0.2)
        async with asyncio.timeout(30):
            while await health(channel) != serving:
                await asyncio.sleep(0.02)
        assert list((await client.status()).failing) == []
