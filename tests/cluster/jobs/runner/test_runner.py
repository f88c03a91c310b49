"""Running jobs: in what order, how many at once, and going on after a stop, a crash, a lost lease."""

import asyncio

import grpc
import pytest
from served_jobs import answer_to, jobs_server

from isthmus.cluster.jobs.service.manager import Jobs
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, Priority, SamplingParams
from isthmus.proto.errors import Blamed, Exhausted, InvalidRequest, IsthmusError, Unavailable
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.jobs_pb2 import (
    JOB_STATE_FAILED,
    JOB_STATE_SUCCEEDED,
    GetJobRequest,
    JobEvent,
    SubmitJobRequest,
)


def submission(
    *prompts: str, priority: Priority.ValueType = 0, max_tokens: int = 8, **sampling: object
) -> SubmitJobRequest:
    options = SamplingParams(max_tokens=max_tokens, seed=3, **sampling)  # pyright: ignore[reportArgumentType]
    return SubmitJobRequest(
        requests=[GenerateRequest(prompt=prompt, sampling=options) for prompt in prompts], priority=priority
    )


def expected(prompt: str, max_tokens: int = 8) -> str:
    return bytes(answer_to(prompt, 3, max_tokens)).decode()


def tokens_of(events: list[JobEvent], item: int = 0) -> list[int]:
    """All recorded tokens of a request; they must follow each other without gap or repeat."""
    tokens: list[int] = []
    for event in events:
        if event.HasField("output") and event.output.request_index == item:
            assert event.output.index == len(tokens)
            tokens += event.output.token_ids
    return tokens


async def crash(jobs: Jobs) -> None:
    """Ends a gateway's jobs as SIGKILL does: nothing more is recorded, and its lease stays."""
    runner = jobs._runner
    tasks = [task for job in runner._jobs.values() for task in job.running.values()]
    for task in [*runner._tasks, *tasks, runner._recording]:
        task.cancel()
    await asyncio.gather(*runner._tasks, *tasks, runner._recording, return_exceptions=True)
    runner._tasks = []


class Hold:
    """Lets every request make some tokens, and then holds it until it is let go."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.go = asyncio.Event()

    async def __call__(self, request: GenerateRequest, position: int) -> None:
        if position >= self._tokens:
            await self.go.wait()


@pytest.mark.parametrize("how", ["stopped", "crashed"])
async def test_a_job_goes_on_from_its_last_token(url: str, how: str) -> None:
    """Text, stop strings and characters continue where they were; no token is made or recorded twice."""
    async with jobs_server(url, Hold(5)) as first:
        job = await first.stub.SubmitJob(submission("one", "two"))
        async with asyncio.timeout(10):
            while (await first.stub.GetJob(GetJobRequest(job_id=job.job_id))).output_tokens < 10:
                await asyncio.sleep(0.01)
        await (crash(first.jobs) if how == "crashed" else first.jobs.drain())
        async with jobs_server(url) as second:  # takes over when the lease of a second is over
            ended = await second.ended(job.job_id)
            assert (ended.state, ended.resumes, ended.output_tokens) == (JOB_STATE_SUCCEEDED, 1, 16)
            assert sorted(second.generator.asked) == [("one", 5), ("two", 5)]
            events = await second.watch(job.job_id)
            for item, prompt in enumerate(("one", "two")):
                assert bytes(tokens_of(events, item)).decode() == expected(prompt)
            assert [result.text for result in await second.results(job.job_id)] == [expected("one"), expected("two")]


async def test_a_watcher_at_another_gateway_sees_everything(url: str) -> None:
    hold = Hold(2)
    async with jobs_server(url, hold) as first, jobs_server(url, hold) as second:
        job = await first.stub.SubmitJob(submission("one"))
        watching = [asyncio.create_task(server.watch(job.job_id)) for server in (first, second)]
        await asyncio.sleep(0.3)
        hold.go.set()
        here, there = await asyncio.gather(*watching)
        assert here == there
        assert bytes(tokens_of(there)).decode() == expected("one")


async def test_a_cancel_at_another_gateway_stops_the_work(url: str) -> None:
    from isthmus.proto.jobs_pb2 import CancelJobRequest

    async with jobs_server(url, Hold(2)) as first:
        job = await first.stub.SubmitJob(submission("one"))
        async with asyncio.timeout(10):
            while not first.generator.running:
                await asyncio.sleep(0.01)
        async with jobs_server(url) as second:
            await second.stub.CancelJob(CancelJobRequest(job_id=job.job_id))
            async with asyncio.timeout(10):
                while first.generator.running:
                    await asyncio.sleep(0.01)


async def test_a_gateway_that_was_taken_for_dead_goes_on_with_a_new_lease(url: str) -> None:
    hold = Hold(3)
    async with jobs_server(url, hold) as server:
        job = await server.stub.SubmitJob(submission("one"))
        async with asyncio.timeout(10):
            while (await server.stub.GetJob(GetJobRequest(job_id=job.job_id))).output_tokens < 3:
                await asyncio.sleep(0.01)
        before = server.jobs._runner._id
        await server.jobs._store.leave(before)  # as another gateway does that finds the lease expired
        hold.go.set()
        ended = await server.ended(job.job_id)
        assert (ended.state, ended.resumes) == (JOB_STATE_SUCCEEDED, 1)
        async with asyncio.timeout(30):  # it may find out with its next sign of life only
            while server.jobs._runner._id == before:
                await asyncio.sleep(0.01)
        assert bytes(tokens_of(await server.watch(job.job_id))).decode() == expected("one")


async def test_no_worker_and_no_room_are_waited_for(url: str) -> None:
    errors = [Unavailable("gone"), Exhausted("full"), Unavailable("gone")]

    async def before(request: GenerateRequest, position: int) -> None:
        if position == 4 and errors:
            raise errors.pop()

    async with jobs_server(url, before) as server:
        job = await server.stub.SubmitJob(submission("one"))
        ended = await server.ended(job.job_id)
        assert (ended.state, ended.output_tokens) == (JOB_STATE_SUCCEEDED, 8)
        assert server.generator.asked == [("one", 0), ("one", 4), ("one", 4), ("one", 4)]


@pytest.mark.parametrize(
    "error, code",
    [
        (InvalidRequest("too odd"), grpc.StatusCode.INVALID_ARGUMENT),
        (Blamed("engines died of it"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_an_error_that_lasts_ends_the_request(url: str, error: IsthmusError, code: grpc.StatusCode) -> None:
    async def before(request: GenerateRequest, position: int) -> None:
        raise error

    async with jobs_server(url, before) as server:
        job = await server.stub.SubmitJob(submission("one"))
        ended = await server.ended(job.job_id)
        assert (ended.state, ended.error.code, ended.error.message) == (
            JOB_STATE_FAILED,
            code.name,
            str(error),
        )
        assert len(server.generator.asked) == 1, "it is not tried again"


async def test_an_error_with_a_nul_can_be_kept(url: str) -> None:
    async def before(request: GenerateRequest, position: int) -> None:
        raise InvalidRequest("the template says a\0b")

    async with jobs_server(url, before) as server:
        job = await server.stub.SubmitJob(submission("one"))
        ended = await server.ended(job.job_id)
        assert ended.error.message == "the template says a\N{REPLACEMENT CHARACTER}b"


async def test_interactive_jobs_start_first_and_jobs_take_turns(url: str) -> None:
    hold = Hold(0)
    async with jobs_server(url, hold, max_running=1) as server:
        await server.stub.SubmitJob(submission("first"))
        async with asyncio.timeout(10):
            while not server.generator.asked:
                await asyncio.sleep(0.01)
        jobs = [
            await server.stub.SubmitJob(submission("a1", "a2", "a3")),
            await server.stub.SubmitJob(submission("b1", "b2")),
            await server.stub.SubmitJob(submission("now", priority=PRIORITY_INTERACTIVE)),
        ]
        hold.go.set()
        for job in jobs:
            await server.ended(job.job_id)
        order = [prompt for prompt, _ in server.generator.asked]
        assert order[0] == "first"
        assert order.index("now") <= 2  # one more may have been chosen before it came
        assert [prompt for prompt in order if prompt[0] in "ab"] == ["a1", "b1", "a2", "b2", "a3"]
        assert server.generator.most_running == 1


async def test_batch_grows_while_idle_and_yields_to_others(url: str) -> None:
    others, hold = [0], Hold(0)
    async with jobs_server(url, hold, others=lambda: others[0], max_running_batch=16) as server:
        prompts = [f"p{number}" for number in range(40)]
        await server.stub.SubmitJob(submission(*prompts, priority=PRIORITY_BATCH))
        async with asyncio.timeout(10):
            while server.generator.running < 16:
                await asyncio.sleep(0.01)
        others[0] = 1
        await asyncio.sleep(0.3)
        most = server.generator.running
        hold.go.set()
        await asyncio.sleep(0.05)
        assert most == 16
        later = server.jobs._runner._batch_limit.target
        assert later == 2


async def test_batch_output_is_recorded_in_larger_events(url: str) -> None:
    async with jobs_server(url) as server:
        job = await server.stub.SubmitJob(submission("one", priority=PRIORITY_BATCH, max_tokens=50))
        await server.ended(job.job_id)
        events = await server.watch(job.job_id)
        assert bytes(tokens_of(events)).decode() == expected("one", 50)
        assert len(events) < 10


async def test_a_stop_string_across_a_crash(url: str) -> None:
    whole = expected("one", 12)
    stop = whole[4:7]
    async with jobs_server(url, Hold(6)) as first:  # the stop string has begun, and its beginning is held back
        job = await first.stub.SubmitJob(submission("one", max_tokens=12, stop=[stop]))
        async with asyncio.timeout(10):
            while (await first.stub.GetJob(GetJobRequest(job_id=job.job_id))).output_tokens < 6:
                await asyncio.sleep(0.01)
        await crash(first.jobs)
        async with jobs_server(url) as second:
            await second.ended(job.job_id)
            (result,) = await second.results(job.job_id)
            assert (result.text, result.usage.output_tokens) == (whole[: whole.index(stop)], whole.index(stop) + 3)
