"""The Jobs service as clients see it."""

import asyncio
import base64
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from served_jobs import JobsServer, answer_to, jobs_server

from isthmus.proto.common_pb2 import PRIORITY_BATCH, SamplingParams
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.jobs_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_EXPIRED,
    JOB_STATE_FAILED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    CancelJobRequest,
    DeleteJobRequest,
    GetJobRequest,
    GetResultRequest,
    JobEvent,
    ListJobsRequest,
    SubmitJobRequest,
    WatchJobRequest,
)


def request(prompt: str = "p", *, max_tokens: int = 5, seed: int = 1, **sampling: object) -> GenerateRequest:
    options = SamplingParams(max_tokens=max_tokens, seed=seed, **sampling)  # pyright: ignore[reportArgumentType]
    return GenerateRequest(prompt=prompt, sampling=options)


def text_of(events: list[JobEvent], item: int = 0) -> str:
    return "".join(
        event.output.text for event in events if event.HasField("output") and event.output.request_index == item
    )


def expected(prompt: str = "p", *, max_tokens: int = 5, seed: int = 1) -> str:
    return bytes(answer_to(prompt, seed, max_tokens)).decode()


async def never(request: GenerateRequest, position: int) -> None:
    if position == 2:
        await asyncio.Event().wait()


async def status(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call  # pyright: ignore[reportGeneralTypeIssues]
    return raised.value.code(), raised.value.details() or ""


async def running(server: JobsServer, job_id: str, tokens: int) -> None:
    """Waits until that many tokens of a job are recorded."""
    async with asyncio.timeout(10):
        while (await server.stub.GetJob(GetJobRequest(job_id=job_id))).output_tokens < tokens:
            await asyncio.sleep(0.01)


async def test_a_job_from_submission_to_result(url: str) -> None:
    async with jobs_server(url) as server:
        submission = SubmitJobRequest(requests=[request()], labels={"team": "a"}, tenant="t")
        submitted = await server.stub.SubmitJob(submission)
        assert (submitted.state, submitted.request_count, submitted.prompt_tokens) == (JOB_STATE_QUEUED, 1, 1)
        job = await server.ended(submitted.job_id)
        assert (job.state, job.output_tokens, job.succeeded_count) == (JOB_STATE_SUCCEEDED, 5, 1)
        assert (dict(job.labels), job.tenant, job.resumes) == ({"team": "a"}, "t", 0)
        assert job.create_time.ToNanoseconds() <= job.start_time.ToNanoseconds() <= job.end_time.ToNanoseconds()
        assert job.expire_time.ToSeconds() - job.end_time.ToSeconds() == 7 * 86400
        (result,) = await server.results(job.job_id)
        assert (result.text, result.state, bytes(result.token_ids).decode()) == (expected(), job.state, expected())
        assert (result.usage.prompt_tokens, result.usage.output_tokens, result.timings.seed) == (1, 5, 1)
        assert result.request_id == f"{job.job_id}.0"


async def test_a_watcher_sees_every_event_once(url: str) -> None:
    async with jobs_server(url) as server:
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request("a"), request("b")]))
        events = await server.watch(job.job_id)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        states = [event.state for event in events if event.HasField("state")]
        assert states == [JOB_STATE_QUEUED, JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED]
        assert (text_of(events, 0), text_of(events, 1)) == (expected("a"), expected("b"))
        assert events == await server.watch(job.job_id)
        for number in (1, 4, len(events), len(events) + 1):
            assert await server.watch(job.job_id, number) == events[number - 1 :]


async def test_a_watcher_that_comes_back_misses_and_repeats_nothing(url: str) -> None:
    pace = asyncio.Semaphore(0)

    async def before(request: GenerateRequest, position: int) -> None:
        await pace.acquire()

    async with jobs_server(url, before) as server:
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request(max_tokens=20)]))
        seen: list[JobEvent] = []
        while not seen or seen[-1].state != JOB_STATE_SUCCEEDED:
            pace.release()
            call = server.stub.WatchJob(WatchJobRequest(job_id=job.job_id, from_event=len(seen) + 1))
            async with asyncio.timeout(10):
                answer = await call.read()
            call.cancel()
            seen += answer.events
        assert [event.number for event in seen] == list(range(1, 24))
        assert text_of(seen) == expected(max_tokens=20)


async def test_the_same_key_is_the_same_job(url: str) -> None:
    async with jobs_server(url) as server:
        submission = SubmitJobRequest(requests=[request()], idempotency_key="k", tenant="t")
        one, two = await asyncio.gather(server.stub.SubmitJob(submission), server.stub.SubmitJob(submission))
        assert one.job_id == two.job_id
        await server.ended(one.job_id)
        assert (await server.stub.SubmitJob(submission)).job_id == one.job_id
        submission.tenant = "other"
        other = await server.stub.SubmitJob(submission)
        assert other.job_id != one.job_id
        await server.ended(other.job_id)
        submission.requests[0].prompt = "another"
        code, details = await status(server.stub.SubmitJob(submission))
        assert (code, "idempotency key 'k' belongs to job" in details) == (grpc.StatusCode.ALREADY_EXISTS, True)
        assert len(server.generator.asked) == 2


async def test_a_seed_is_drawn_once(url: str) -> None:
    async with jobs_server(url) as server:
        unseeded = GenerateRequest(prompt="p", sampling=SamplingParams(max_tokens=5))
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[unseeded]))
        await server.ended(job.job_id)
        (result,) = await server.results(job.job_id)
        assert result.text == expected(seed=result.timings.seed)


async def test_jobs_are_listed_by_what_they_are(url: str) -> None:
    async with jobs_server(url, never) as server:
        ids = []
        for number in range(5):
            labels = {"parity": str(number % 2), "all": "x"}
            submission = SubmitJobRequest(requests=[request()], labels=labels, tenant=f"t{number}")
            ids.append((await server.stub.SubmitJob(submission)).job_id)
        await server.stub.CancelJob(CancelJobRequest(job_id=ids[1]))
        times = [(await server.stub.GetJob(GetJobRequest(job_id=job_id))).create_time for job_id in ids]

        async def listed(**fields: object) -> list[int]:
            answer = await server.stub.ListJobs(ListJobsRequest(**fields))  # pyright: ignore[reportArgumentType]
            return [ids.index(job.job_id) for job in answer.jobs]

        assert await listed() == [4, 3, 2, 1, 0]
        assert await listed(states=[JOB_STATE_CANCELLED]) == [1]
        assert await listed(labels={"parity": "0", "all": "x"}) == [4, 2, 0]
        assert await listed(labels={"parity": "2"}) == []
        assert await listed(tenant="t3") == [3]
        assert await listed(created_after=times[1], created_before=times[4]) == [3, 2]
        first = await server.stub.ListJobs(ListJobsRequest(page_size=3))
        second = await server.stub.ListJobs(ListJobsRequest(page_size=3, page_token=first.next_page_token))
        assert [ids.index(job.job_id) for page in (first, second) for job in page.jobs] == [4, 3, 2, 1, 0]
        assert second.next_page_token == ""


async def test_cancel_keeps_what_there_is(url: str) -> None:
    async with jobs_server(url, never) as server:
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request()]))
        await running(server, job.job_id, 2)
        code, details = await status(server.stub.GetResult(GetResultRequest(job_id=job.job_id)))
        assert (code, "allow_partial" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        (partial,) = await server.results(job.job_id, allow_partial=True)
        assert (partial.text, partial.state) == (expected()[:2], JOB_STATE_QUEUED)
        cancelled = await server.stub.CancelJob(CancelJobRequest(job_id=job.job_id))
        assert cancelled.state == JOB_STATE_CANCELLED
        assert (await server.watch(job.job_id))[-1].state == JOB_STATE_CANCELLED
        (result,) = await server.results(job.job_id)
        assert (result.text, result.state) == (expected()[:2], JOB_STATE_CANCELLED)
        async with asyncio.timeout(5):
            while server.generator.running:
                await asyncio.sleep(0.01)
        code, details = await status(server.stub.CancelJob(CancelJobRequest(job_id=job.job_id)))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert details == f"job {job.job_id} is CANCELLED and cannot become CANCELLED; allowed: nothing: it has ended"


async def test_delete_forgets_a_job_that_has_ended(url: str) -> None:
    async with jobs_server(url, never) as server:
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request()], idempotency_key="k"))
        code, details = await status(server.stub.DeleteJob(DeleteJobRequest(job_id=job.job_id)))
        assert (code, "cancel it first" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        await server.stub.CancelJob(CancelJobRequest(job_id=job.job_id))
        await server.stub.DeleteJob(DeleteJobRequest(job_id=job.job_id))
        for call in (
            server.stub.GetJob(GetJobRequest(job_id=job.job_id)),
            server.stub.DeleteJob(DeleteJobRequest(job_id=job.job_id)),
            server.stub.CancelJob(CancelJobRequest(job_id=job.job_id)),
            server.stub.GetResult(GetResultRequest(job_id=job.job_id)),
        ):
            assert (await status(call))[0] is grpc.StatusCode.NOT_FOUND
        again = await server.stub.SubmitJob(SubmitJobRequest(requests=[request()], idempotency_key="k"))
        assert again.job_id != job.job_id


async def test_a_deadline_ends_a_job(url: str) -> None:
    async with jobs_server(url, never) as server:
        deadline = Timestamp()
        deadline.FromNanoseconds(time.time_ns() + 500_000_000)
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request(), request()], deadline=deadline))
        ended = await server.ended(job.job_id)
        assert (ended.state, ended.output_tokens) == (JOB_STATE_EXPIRED, 4)
        assert ended.end_time.ToNanoseconds() >= deadline.ToNanoseconds()
        assert [result.state for result in await server.results(job.job_id)] == [JOB_STATE_EXPIRED] * 2


async def test_a_request_that_fails_does_not_stop_the_others(url: str) -> None:
    async def before(asked: GenerateRequest, position: int) -> None:
        if asked.prompt == "bad" and position == 3:
            raise KeyError("secret")

    async with jobs_server(url, before) as server:
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request("a"), request("bad"), request("c")]))
        ended = await server.ended(job.job_id)
        assert (ended.state, ended.succeeded_count, ended.failed_count) == (JOB_STATE_FAILED, 2, 1)
        assert (ended.error.code, "secret" in ended.error.message) == ("UNKNOWN", False)
        results = await server.results(job.job_id, page_size=2)
        assert [result.text for result in results] == [expected("a"), expected("bad")[:3], expected("c")]
        assert [result.error.code for result in results] == ["", "UNKNOWN", ""]


async def test_ten_thousand_requests_are_one_job(url: str) -> None:
    async with jobs_server(url) as server:
        requests = [request("x", max_tokens=1, seed=number) for number in range(10_000)]
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=requests), timeout=60)
        await server.ended(job.job_id, within_s=120)
        results = await server.results(job.job_id, page_size=1000)
        assert [result.request_index for result in results] == list(range(10_000))
        assert [result.text for result in results] == [expected("x", max_tokens=1, seed=n) for n in range(10_000)]
        code, details = await status(server.stub.SubmitJob(SubmitJobRequest(requests=[*requests, request()])))
        assert (code, details) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "a job of 10001 requests; allowed: 1 to 10000",
        )


@pytest.mark.parametrize(
    ("submission", "details"),
    [
        (SubmitJobRequest(), "a job of 0 requests; allowed: 1 to 10000"),
        (SubmitJobRequest(requests=[GenerateRequest()]), "the request has no input; allowed: prompt, chat or tokens"),
        (SubmitJobRequest(requests=[request(), request("")]), "request 1: the prompt is empty"),
        (SubmitJobRequest(requests=[request(top_p=3)]), "top_p is 3; allowed: (0, 1]"),
        (SubmitJobRequest(requests=[request("p" * 1000)]), "prompt of 1000 tokens; allowed: at most 999"),
        (SubmitJobRequest(requests=[request()], tenant="t" * 129), "tenant of 129 characters; allowed: at most 128"),
        (SubmitJobRequest(requests=[request()], labels={"": "x"}), "label ''; allowed: keys of 1 to 63"),
        (SubmitJobRequest(requests=[request()], deadline=Timestamp(seconds=1)), "the deadline has passed already"),
        (SubmitJobRequest(requests=[request()], tenant="a\0b"), "tenant has characters that cannot be printed"),
        (SubmitJobRequest(requests=[request()], idempotency_key="\0"), "idempotency_key has characters"),
        (SubmitJobRequest(requests=[request()], labels={"k\0": "x"}), "label 'k\\x00'; allowed: keys of 1 to 63"),
        (SubmitJobRequest(requests=[request()], labels={"k": "\0"}), "label 'k'; allowed: keys of 1 to 63"),
        (
            SubmitJobRequest(requests=[request()], deadline=Timestamp(seconds=1 << 55)),
            "deadline of 36028797018963968 s",
        ),
        (
            SubmitJobRequest(requests=[request()], deadline=Timestamp(seconds=1 << 33, nanos=-5)),
            "deadline of 8589934592",
        ),
        (SubmitJobRequest(requests=[request()], deadline=Timestamp(seconds=253402300799)), "the deadline is 25"),
        (SubmitJobRequest(requests=[request()], retention=Duration(seconds=1, nanos=-1)), "retention of 1 s and -1"),
        (
            SubmitJobRequest(requests=[request()], retention=Duration(seconds=1 << 62)),
            "retention of 461168",
        ),
        (SubmitJobRequest(requests=[request(n=2)]), "n is 2; allowed in a job: 1, and as many requests as answers"),
        (SubmitJobRequest(requests=[request(prompt_logprobs=1)]), "prompt_logprobs is set; allowed: not in a job"),
        (SubmitJobRequest(requests=[request(stop=["x"] * 17)]), "17 stop strings; allowed: at most 16"),
        (SubmitJobRequest(requests=[request(stop_token_ids=[1] * 257)]), "257 stop token ids; allowed: at most 256"),
        (
            SubmitJobRequest(requests=[request()], retention=Duration(seconds=0)),
            "retention of 0 s and 0 ns; allowed",
        ),
    ],
)
async def test_bad_submissions(url: str, submission: SubmitJobRequest, details: str) -> None:
    async with jobs_server(url) as server:
        code, told = await status(server.stub.SubmitJob(submission))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert told.startswith(details)


async def test_bad_questions(url: str) -> None:
    async with jobs_server(url, never) as server:
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request()]))
        assert await status(server.stub.GetJob(GetJobRequest(job_id="none"))) == (
            grpc.StatusCode.NOT_FOUND,
            "no job 'none': it was never here, was deleted, or its retention is over",
        )
        call = server.stub.WatchJob(WatchJobRequest(job_id=job.job_id, from_event=99))
        code, details = await status(call.read())
        assert (code, "cannot be watched from event 99" in details) == (grpc.StatusCode.OUT_OF_RANGE, True)
        assert (await status(server.stub.WatchJob(WatchJobRequest(job_id="none")).read()))[
            0
        ] is grpc.StatusCode.NOT_FOUND
        assert (await status(server.stub.ListJobs(ListJobsRequest(page_token="?"))))[1].startswith("page_token '?'")
        assert (await status(server.stub.ListJobs(ListJobsRequest(page_size=2000))))[1].startswith("page_size is 2000")


async def test_a_deleted_job_ends_its_watchers(url: str) -> None:
    async with jobs_server(url, never) as server:
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request()], priority=PRIORITY_BATCH))
        watching = asyncio.create_task(server.watch(job.job_id))
        await running(server, job.job_id, 2)
        await server.stub.CancelJob(CancelJobRequest(job_id=job.job_id))
        await server.stub.DeleteJob(DeleteJobRequest(job_id=job.job_id))
        assert (await watching)[-1].state == JOB_STATE_CANCELLED


def token(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("question", "details"),
    [
        (ListJobsRequest(created_after=Timestamp(seconds=1 << 55)), "created_after of 36028797018963968 s"),
        (ListJobsRequest(created_before=Timestamp(nanos=-5)), "created_before of 0 s and -5 ns is no time"),
        (ListJobsRequest(page_token=token("²")), "page_token 'wrI=' is not one"),
        (ListJobsRequest(page_token=token("9" * 30 + " x")), "page_token 'OTk5"),
        (ListJobsRequest(page_token=token("9223372036854775808 x")), "page_token '"),
        (ListJobsRequest(page_token=token("1 \0")), "page_token '"),
        (ListJobsRequest(page_token="x" * 300), "page_token of 300 characters"),
        (ListJobsRequest(states=[1] * 101), "states has 101 entries; allowed: at most 100"),
        (ListJobsRequest(states=[99]), "no state 99; allowed: QUEUED"),  # pyright: ignore[reportArgumentType]
        (ListJobsRequest(labels={f"key-{n}": "" for n in range(33)}), "33 labels; allowed: at most 32"),
        (ListJobsRequest(labels={"a\0": "b"}), "label 'a\\x00'; allowed: keys of 1 to 63"),
        (ListJobsRequest(tenant="\0"), "tenant has characters that cannot be printed"),
        (GetJobRequest(job_id="a\0"), "job_id has characters that cannot be printed"),
        (GetJobRequest(job_id="j" * 257), "job_id of 257 characters; allowed: at most 256"),
        (CancelJobRequest(job_id="\0"), "job_id has characters that cannot be printed"),
        (DeleteJobRequest(job_id="\0"), "job_id has characters that cannot be printed"),
        (WatchJobRequest(job_id="\0"), "job_id has characters that cannot be printed"),
        (GetResultRequest(job_id="\0"), "job_id has characters that cannot be printed"),
        (GetResultRequest(job_id="JOB", page_token=token("²")), "page_token 'wrI=' is not one"),
        (GetResultRequest(job_id="JOB", page_token=token("2147483648")), "page_token '"),
        (GetResultRequest(job_id="JOB", page_token=token("9" * 30)), "page_token '"),
    ],
)
async def test_questions_with_values_that_no_client_makes(url: str, question: Any, details: str) -> None:
    async with jobs_server(url, never) as server:
        if getattr(question, "job_id", "") == "JOB":
            question.job_id = (await server.stub.SubmitJob(SubmitJobRequest(requests=[request()]))).job_id
        call = getattr(server.stub, type(question).__name__.removesuffix("Request"))(question)
        code, told = await status(call.read() if isinstance(question, WatchJobRequest) else call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert told.startswith(details)


async def test_states_are_a_set_and_extreme_times_are_times(url: str) -> None:
    async with jobs_server(url, never) as server:
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=[request("null \0 inside")]))
        for times in (
            {"created_after": Timestamp(seconds=-62135596800), "created_before": Timestamp(seconds=253402300799)},
            {"created_after": Timestamp(), "states": [1, 2] * 50},
        ):
            listed = await server.stub.ListJobs(ListJobsRequest(**times))
            assert [found.job_id for found in listed.jobs] == [job.job_id]
        late = Timestamp()
        late.FromSeconds(int(time.time()) + 364 * 86400)
        assert (await server.stub.SubmitJob(SubmitJobRequest(requests=[request()], deadline=late))).deadline == late
