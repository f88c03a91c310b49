"""What runs the jobs of a gateway raises what it should not: jobs end right and lose nothing, or one of them fails."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted import says, scripted_cluster
from served_jobs import QUICK, answer_to, jobs_server

from isthmus.cluster.frontend import gateway as gateway_module
from isthmus.cluster.jobs.runner import recorder as recorder_module
from isthmus.cluster.jobs.runner import runner as runner_module
from isthmus.cluster.jobs.runner.active import ActiveJob
from isthmus.cluster.jobs.store.event_bus import EventBus
from isthmus.cluster.jobs.store.store import JobStore
from isthmus.proto import tasks as tasks_module
from isthmus.proto.common_pb2 import SamplingParams
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.jobs_pb2 import (
    JOB_STATE_FAILED,
    JOB_STATE_SUCCEEDED,
    GetJobRequest,
    JobEvent,
    SubmitJobRequest,
)
from isthmus.proto.rpc.transport import Transport

TOKENS = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(recorder_module, "LAST_RETRY_S", 0.02)


def raises(patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], times: int = 1) -> list[int]:
    """Has a method raise so many times where `when` is true of its arguments; how many times are left."""
    left, genuine = [times], getattr(owner, name)

    def raising(*args: Any, **kwargs: Any) -> Any:
        if left[0] and when(*args):
            left[0] -= 1
            raise ValueError("boom")
        return genuine(*args, **kwargs)

    patch.setattr(owner, name, raising)
    return left


def always(*_: Any) -> bool:
    return True


def submission(*prompts: str) -> SubmitJobRequest:
    sampling = SamplingParams(max_tokens=TOKENS, seed=3)
    return SubmitJobRequest(requests=[GenerateRequest(prompt=prompt, sampling=sampling) for prompt in prompts])


def tokens_of(events: list[JobEvent], item: int = 0) -> list[int]:
    outputs = [event.output for event in events if event.HasField("output") and event.output.request_index == item]
    return [token for output in outputs for token in output.token_ids]


async def test_a_recorder_that_fails_once_goes_on_and_loses_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = raises(monkeypatch, JobStore, "record", always)
    async with jobs_server(url) as server:
        jobs = [await server.stub.SubmitJob(submission(prompt)) for prompt in ("one", "two", "three")]
        for job, prompt in zip(jobs, ("one", "two", "three"), strict=True):
            assert (await server.ended(job.job_id)).state == JOB_STATE_SUCCEEDED
            assert tokens_of(await server.watch(job.job_id)) == answer_to(prompt, 3, TOKENS)
        assert left == [0]
        assert server.jobs._runner._background.failures == {"jobs recorder": 1}


async def test_a_job_that_cannot_be_recorded_fails_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison: list[str] = []
    raises(
        monkeypatch,
        JobStore,
        "record",
        lambda self, owner, made: any(progress.job_id in poison for progress in made),
        times=1000,
    )
    go = asyncio.Event()

    async def hold(request: GenerateRequest, position: int) -> None:
        await go.wait()

    async with jobs_server(url, hold) as server:
        jobs = [await server.stub.SubmitJob(submission(prompt)) for prompt in ("one", "two", "three")]
        poison.append(jobs[1].job_id)
        go.set()
        ended = [await server.ended(job.job_id) for job in jobs]
        assert [job.state for job in ended] == [JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_SUCCEEDED]
        assert ended[1].error.message == "its output cannot be recorded (ValueError); see the gateway's log"
        later = await server.stub.SubmitJob(submission("four"))
        assert (await server.ended(later.job_id)).state == JOB_STATE_SUCCEEDED
        assert server.generator.running == 0


@pytest.mark.parametrize(
    ("owner", "method", "task"),
    [
        (JobStore, "claim", "jobs schedule"),
        (JobStore, "waiting", "jobs schedule"),
        (JobStore, "renew", "jobs sweep"),
        (JobStore, "owned", "jobs sweep"),
        (JobStore, "erase", "jobs prune"),
        (JobStore, "last_events", "jobs look_for_events"),
        (runner_module, "load_of", "jobs look_at_workers"),
        (EventBus, "publish", None),  # in the writer's hands: asyncio logs it
    ],
)
async def test_a_loop_that_fails_once_goes_on(
    url: str, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, task: str | None
) -> None:
    go = asyncio.Event()

    async def hold(request: GenerateRequest, position: int) -> None:
        await go.wait()

    left = raises(monkeypatch, owner, method, always)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with jobs_server(url, hold) as server:
        if method == "last_events":
            monkeypatch.setattr(EventBus, "watched", property(lambda self: ["of another gateway"]))
        many = ["p"] * (ActiveJob.PAGE + 1)  # more than come along with the claim
        job = await server.stub.SubmitJob(submission(*many))
        async with asyncio.timeout(20):
            while left[0] or server.generator.running < 10:
                await asyncio.sleep(0.01)
        go.set()
        ended = await server.ended(job.job_id, within_s=30)
        assert (ended.state, ended.succeeded_count) == (JOB_STATE_SUCCEEDED, len(many))
        if task is not None:
            assert server.jobs._runner._background.failures == {task: 1}
        assert server.jobs.failing == []


async def test_a_request_that_cannot_be_read_fails_and_the_others_are_answered(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raises(monkeypatch, ActiveJob, "request_of", lambda self, row: row["item"] == 1)
    async with jobs_server(url) as server:
        job = await server.stub.SubmitJob(submission("one", "two", "three"))
        ended = await server.ended(job.job_id)
        assert (ended.state, ended.succeeded_count, ended.failed_count) == (JOB_STATE_FAILED, 2, 1)
        results = await server.results(job.job_id)
        assert [result.state for result in results] == [JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_SUCCEEDED]


async def test_an_answer_that_cannot_be_resumed_fails(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go = asyncio.Event()

    async def hold(request: GenerateRequest, position: int) -> None:
        if position == 4:
            await go.wait()

    async with jobs_server(url, hold) as first:
        job = await first.stub.SubmitJob(submission("one"))
        async with asyncio.timeout(10):
            while not (await first.stub.GetJob(GetJobRequest(job_id=job.job_id))).output_tokens:
                await asyncio.sleep(0.01)
    raises(monkeypatch, JobStore, "outputs", always)
    async with jobs_server(url) as second:
        ended = await second.ended(job.job_id)
        assert (ended.state, ended.error.message.partition(",")[0]) == (
            JOB_STATE_FAILED,
            "internal error",
        )


async def test_jobs_that_do_not_run_turn_their_service_red_and_no_other(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raises(monkeypatch, JobStore, "claim", always, times=1_000_000)
    monkeypatch.setattr(gateway_module, "HEALTH_PERIOD_S", 0.05)
    monkeypatch.setattr(tasks_module, "LAST_PAUSE_S", 0.1)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with (
        scripted_cluster(says("hello"), jobs_db=url, jobs=QUICK) as cluster,
        Transport().dial(cluster.gateway.address) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        found: dict[str, int] = {}
        async with asyncio.timeout(30):
            while found != {"": not_serving, "isthmus.v1.Generation": serving, "isthmus.v1.Jobs": not_serving}:
                for service in ("", "isthmus.v1.Generation", "isthmus.v1.Jobs"):
                    found[service] = (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
                await asyncio.sleep(0.02)
                if not cluster.gateway._jobs_failing():
                    found.clear()
