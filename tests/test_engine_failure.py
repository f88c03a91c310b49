"""An engine that fails tells everybody who asks, and its worker is red: nothing hangs."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import Pair, worker_pair
from models import model_path

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.decode.engine import DecodeEngine
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.engine import PrefillEngine
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.rpc.statuses import ENGINE_FAILED_KEY, ERROR_KEY
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import WorkerHealth
from isthmus.worker import watchdog
from isthmus.worker.engine import EngineThread
from isthmus.worker.step_plan import StepBatch, StepPlan

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
        async with Transport().dial(worker.address) as channel:
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


POISON = 7  # the first token of prompts that engines die of
MODEL = "tiny-llama"


def is_poison(engine: PrefillEngine | DecodeEngine, step: StepPlan | StepBatch) -> bool:
    """Whether a step of either role computes such a prompt."""
    if isinstance(engine, PrefillEngine):
        prompts = [engine._jobs[plan.sequence].token_ids for plan in step.sequences]
    else:
        prompts = [engine._sequences[plan.sequence].prompt for plan in step.sequences]
    return any(prompt[0] == POISON for prompt in prompts)


async def told(pair: Pair, prompt: list[int]) -> tuple[grpc.StatusCode, dict[str, str]]:
    """How a request ended that failed: code and trailing metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.generate(prompt, GREEDY)
    return caught.value.code(), {key: str(value) for key, value in caught.value.trailing_metadata() or ()}


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_who_was_in_the_step_is_told_so_and_nobody_else(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with worker_pair(model_path(MODEL), decode={"max_batch": 1}) as pair:
        engine = getattr(pair, role)._engine
        run = engine._runner.run

        begun, go = threading.Event(), threading.Event()

        def dies(batch: StepBatch, *others: Any) -> Any:
            if is_poison(engine, batch):
                begun.set()
                assert go.wait(60)
                raise RuntimeError("device lost")
            return run(batch, *others)

        monkeypatch.setattr(engine._runner, "run", dies)
        first = asyncio.create_task(told(pair, [POISON, 2, 3]))
        assert await asyncio.to_thread(begun.wait, 60)
        waiting = asyncio.create_task(told(pair, [1, 2, 3]))  # for the only place of the batch
        async with asyncio.timeout(60):
            while not pair.decode.server.report().waiting_requests:
                await asyncio.sleep(0.01)
        go.set()
        code, metadata = await first
        assert code is grpc.StatusCode.UNAVAILABLE
        at = f" {pair.prefill.address}" if role == "prefill" else ""
        assert metadata[ENGINE_FAILED_KEY] == f"1{at}"
        code, metadata = await waiting
        assert code is grpc.StatusCode.UNAVAILABLE
        assert (metadata.get(ENGINE_FAILED_KEY), metadata[ERROR_KEY]) == (None, "Unavailable")


@contextlib.asynccontextmanager
async def cluster(workers: int = 3, **gateway: Any) -> AsyncIterator[tuple[Client, list[Any]]]:
    """A gateway and so many workers of each role, all in this process."""
    path = model_path(MODEL)
    own: dict[str, Any] = {"model": path, "dtype": "fp32", "tls": "off"}
    running: list[Any] = []
    for number in range(workers):
        running.append(PrefillWorker(PrefillConfig(**own, name=f"prefill-{number}")))
        running.append(DecodeWorker(DecodeConfig(**own, name=f"decode-{number}")))
    for worker in running:
        await worker.start()
    config = GatewayConfig(**{"preflight": False, **gateway})
    served = Gateway("127.0.0.1:0", load_served_model(path), [worker.address for worker in running], config)
    await served.start()
    try:
        async with asyncio.timeout(20):
            while len(served.fleet.table.routing.prefill) + len(served.fleet.table.routing.decode) < len(running):
                await served.fleet.change.wait()
        async with Client(served.address) as client:
            yield client, running
    finally:
        await served.stop()
        for worker in running:
            await worker.stop()


def asked(number: int, first: int = 20) -> Any:
    sampling = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    request = build_request(token_ids=[first, *range(number, number + 90)], sampling=sampling, codec="raw")
    request.request_id = f"request-{number}"
    return request


@pytest.mark.parametrize("where", ["prefill", "decode", "local prompt"])
async def test_a_poisonous_request_costs_two_engines_and_nobody_else(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = PrefillEngine if where == "prefill" else DecodeEngine
    draw = engine._draw

    def dies(self: Any, plan: StepPlan, *others: Any) -> Any:
        if is_poison(self, plan):
            raise RuntimeError("device lost")
        return draw(self, plan, *others)

    async with cluster(local_prefill="always" if where == "local prompt" else "never") as (client, workers):
        calm = [(await client.answer(asked(number))).token_ids for number in range(8)]
        monkeypatch.setattr(engine, "_draw", dies)
        others = [asyncio.create_task(client.answer(asked(number), timeout_s=60)) for number in range(4)]
        poison = asyncio.create_task(client.answer(asked(100, POISON), timeout_s=60))
        others += [asyncio.create_task(client.answer(asked(number), timeout_s=60)) for number in range(4, 8)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await poison
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "request-100 is not tried again" in (caught.value.details() or "")
        assert [answer.token_ids for answer in await asyncio.gather(*others)] == calm
        assert sum(worker._engine.failure is not None for worker in workers) == 2
        blamed = [record for record in caplog.records if record.message == "a request is blamed"]
        assert [record.__dict__["fields"]["request_id"] for record in blamed] == ["request-100"]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What a blocked step waits for, until the test ends; engines take it for stuck soon."""
    monkeypatch.setattr(watchdog, "MEASURED_STEPS", 0)
    monkeypatch.setattr(watchdog, "STUCK_S", 2.0)
    released = threading.Event()
    yield released
    released.set()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_stuck_engine_is_out_and_its_requests_go_on(
    role: str, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PrefillEngine if role == "prefill" else DecodeEngine
    draw, stuck = engine._draw, list[Any]()

    def hangs(self: Any, plan: StepPlan, *others: Any) -> Any:
        if not stuck and is_poison(self, plan):
            stuck.append(self)
            release.wait()
        return draw(self, plan, *others)

    async with cluster(2, local_prefill="never") as (client, workers):
        requests = [asked(0, POISON), asked(1)]
        calm = [(await client.answer(request)).token_ids for request in requests]
        monkeypatch.setattr(engine, "_draw", hangs)
        ended = {worker.server.name: asyncio.Event() for worker in workers}
        for worker in workers:
            worker.server.end_process = ended[worker.server.name].set
        answers = await asyncio.gather(*(client.answer(request, timeout_s=60) for request in requests))
        assert [answer.token_ids for answer in answers] == calm
        (failed,) = (worker for worker in workers if worker._engine.failure)
        assert failed._engine is stuck[0]
        assert "stuck in a step" in failed.server.report().reason
        await asyncio.wait_for(ended[failed.server.name].wait(), 5)
        release.set()


async def test_a_prefill_step_without_memory_is_made_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[*range(1, 100)], [*range(2, 140)]]
    async with worker_pair(model_path(MODEL)) as pair:
        engine = pair.prefill._engine
        runner, seen, gate = engine._runner, list[int](), threading.Event()
        send, run = engine._send_layer, runner.run

        def full(job: Any, layer: int, due: Any) -> None:
            send(job, layer, due)
            if layer == 1 and seen[-1] > 1:  # after frames of two layers have left
                raise MemoryError

        def counted(batch: StepBatch, *others: Any) -> Any:
            seen.append(len(batch.sequences))
            return run(batch, *others)

        def hold() -> None:
            gate.wait()

        monkeypatch.setattr(engine, "_send_layer", full)
        monkeypatch.setattr(runner, "run", counted)
        engine.thread.post(hold)
        tasks = [asyncio.create_task(pair.generate(prompt, GREEDY)) for prompt in prompts]
        async with asyncio.timeout(20):
            while len(engine.thread._inbox) < 2:
                await asyncio.sleep(0.01)
        gate.set()
        answers = [answer.token_ids for answer in await asyncio.gather(*tasks)]
        assert seen[:3] == [2, 1, 1]
        assert pair.decode._counters["transfers_failed"] == 0
        assert engine.counters["out_of_memory"] == 1
    async with worker_pair(model_path(MODEL)) as pair:
        assert [(await pair.generate(prompt, GREEDY)).token_ids for prompt in prompts] == answers


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")],
)
async def test_a_decode_step_without_memory_ends_one_request_at_most(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[1, 2, 3, 4], [5, 6, 8], [POISON, 9]]
    async with worker_pair(model_path(MODEL)) as pair:
        calm = [(await pair.generate(prompt, GREEDY)).token_ids for prompt in prompts]
        engine = pair.decode._engine
        run = engine._runner.run

        def small(batch: StepBatch, *others: Any) -> Any:
            if len(batch.sequences) > 1 or is_poison(engine, batch):
                run(batch, *others)  # what such a step has written is written again
                raise error
            return run(batch, *others)

        monkeypatch.setattr(engine._runner, "run", small)
        asking = [asyncio.create_task(pair.generate(prompt, GREEDY)) for prompt in prompts]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking[2]
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [(await answer).token_ids for answer in asking[:2]] == calm[:2]
        assert not pair.decode._engine.failure
