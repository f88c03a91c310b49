"""An engine that fails tells everybody who asks, and its worker is red: nothing hangs."""

import asyncio
import threading
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import Pair, worker_pair
from models import model_path

from isthmus.model.engine import EngineThread
from isthmus.proto.sampling import Sampling
from isthmus.proto.serving import open_channel
from isthmus.proto.worker_pb2 import WorkerHealth

GREEDY = Sampling(temperature=0, max_tokens=5, ignore_eos=True)


async def refused(pair: Pair) -> str:
    """The words with which a request is refused as UNAVAILABLE."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.generate([1, 2, 3], GREEDY)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return caught.value.details() or ""


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_failed_engine_refuses_what_runs_and_what_comes(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        worker = getattr(pair, role)
        ended = asyncio.Event()
        worker.server.end_process = ended.set

        def broken(*args: object) -> None:
            raise RuntimeError("device lost")

        monkeypatch.setattr(worker._engine._runner, "run", broken)
        answers = await asyncio.gather(*(refused(pair) for _ in range(3)))
        assert all("device lost" in words for words in answers)
        assert "device lost" in await refused(pair), "a request after the failure"

        report = worker.server.report()
        assert report.health == WorkerHealth.WORKER_HEALTH_FAILED
        assert "device lost" in report.reason
        async with open_channel(worker.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=""))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.wait_for(ended.wait(), 5)


def test_the_thread_still_runs_what_is_posted_after_a_failure() -> None:
    seen, both = [], threading.Event()

    def step() -> bool:
        raise RuntimeError("broken")

    thread = EngineThread("test", step, lambda error: seen.append(str(error)))
    thread.post(lambda: seen.append("first"))
    thread.start()
    thread.post(both.set)
    assert both.wait(5)
    thread.stop()
    assert seen == ["first", "broken"]
