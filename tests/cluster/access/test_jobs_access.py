"""Jobs belong to their tenant: nobody else sees, follows, cancels or deletes them; limits make them wait."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from scripted import Script, ScriptedCluster, hangs, says, scripted_cluster

from isthmus.cluster.access.key_file import KeyDocument, change
from isthmus.cluster.access.keys import KeyRecord, new_key
from isthmus.cluster.access.settings import AccessSettings, Limits
from isthmus.cluster.client.client import build_request
from isthmus.cluster.client.jobs import JobsClient
from isthmus.cluster.jobs.runner.held import HeldJobs
from isthmus.cluster.jobs.states import JobState
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD, Priority
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.jobs_pb2 import Job, ListJobsRequest, SubmitJobRequest


class Tenants:
    """A gateway's database of jobs and file of keys."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url, self.path = url, folder / "keys.json"
        self.records: list[KeyRecord] = []

    def add(self, tenant: str, **limits: Any) -> str:
        key, record = new_key(tenant, limits=Limits(**limits))
        self.records.append(record)
        self.write()
        return key

    def write(self) -> None:
        change(self.path, lambda _: KeyDocument(keys=tuple(self.records)))

    @asynccontextmanager
    async def gateway(self, *scripts: Script, **jobs: Any) -> AsyncIterator[ScriptedCluster]:
        access = AccessSettings(keys_file=str(self.path))
        settings = {"sweep_s": 0.1, **jobs}
        async with scripted_cluster(
            *(scripts or (says("hello"),)), access=access, jobs_db=self.url, jobs=settings
        ) as cluster:
            yield cluster


@pytest.fixture
def tenants(tmp_path: Path, url: str) -> Tenants:
    return Tenants(tmp_path, url)


def submission(number: int = 1, **fields: Any) -> SubmitJobRequest:
    requests = [build_request(prompt="p" * 10, sampling={"max_tokens": 5, "seed": 1}) for _ in range(number)]
    return SubmitJobRequest(requests=requests, **fields)


async def ended(client: JobsClient, job_id: str, within_s: float = 10) -> Job:
    async with asyncio.timeout(within_s):
        while not JobState((job := await client.job(job_id)).state).ended:
            await asyncio.sleep(0.02)
        return job


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code().name, raised.value.details() or ""


async def test_a_job_is_its_tenant_s_alone(tenants: Tenants) -> None:
    one, other, same = tenants.add("one"), tenants.add("other"), tenants.add("one")
    async with (
        tenants.gateway() as cluster,
        JobsClient(cluster.gateway.address, api_key=one) as mine,
        JobsClient(cluster.gateway.address, api_key=other) as theirs,
        JobsClient(cluster.gateway.address, api_key=same) as also_mine,
    ):
        job = await mine.submit(submission())
        assert job.tenant == "one"
        await ended(mine, job.job_id)

        async def drain(events: Any) -> list[Any]:
            return [event async for event in events]

        asks: dict[str, Callable[[JobsClient, str], Any]] = {
            "show": lambda client, job_id: client.job(job_id),
            "watch": lambda client, job_id: drain(client.watch(job_id)),
            "result": lambda client, job_id: drain(client.results(job_id)),
            "cancel": lambda client, job_id: client.cancel(job_id),
            "delete": lambda client, job_id: client.delete(job_id),
        }
        unknown = job.job_id[:-1] + ("0" if job.job_id[-1] != "0" else "1")
        for ask in asks.values():
            code, why = await refused(ask(theirs, job.job_id))
            assert (code, why) == ("NOT_FOUND", (await refused(ask(theirs, unknown)))[1].replace(unknown, job.job_id))
        assert (await theirs.jobs(ListJobsRequest())).jobs == []
        assert (await refused(theirs.jobs(ListJobsRequest(tenant="one"))))[0] == "PERMISSION_DENIED"
        for client in (mine, also_mine):
            for request in (ListJobsRequest(), ListJobsRequest(tenant="one")):
                assert [found.job_id for found in (await client.jobs(request)).jobs] == [job.job_id]
        assert len(await asks["watch"](also_mine, job.job_id)) == (await mine.job(job.job_id)).last_event
        assert [result.text for result in await asks["result"](also_mine, job.job_id)] == ["hello"]
        await asks["delete"](also_mine, job.job_id)
        assert (await refused(mine.job(job.job_id)))[0] == "NOT_FOUND"


async def test_a_job_that_runs_is_followed_and_ended_by_its_tenant_alone(tenants: Tenants) -> None:
    """What is committed in this process comes over a bus that all watchers share."""
    one, other = tenants.add("one"), tenants.add("other")
    async with (
        tenants.gateway(hangs) as cluster,
        JobsClient(cluster.gateway.address, api_key=one) as mine,
        JobsClient(cluster.gateway.address, api_key=other) as theirs,
    ):
        job = await mine.submit(submission())
        watching = aiter(mine.watch(job.job_id))
        events = [await asyncio.wait_for(anext(watching), 10) for _ in range(3)]
        assert events[-1].output.text == "A"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(theirs.watch(job.job_id, from_event=2)))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        assert (await refused(theirs.cancel(job.job_id)))[0] == "NOT_FOUND"
        assert JobState((await mine.job(job.job_id)).state) is JobState.RUNNING
        await mine.cancel(job.job_id)
        assert JobState((await ended(mine, job.job_id)).state) is JobState.CANCELLED


async def test_pages_of_a_list_are_of_one_tenant_whatever_the_token(tenants: Tenants) -> None:
    one, other = tenants.add("one"), tenants.add("other")
    async with (
        tenants.gateway() as cluster,
        JobsClient(cluster.gateway.address, api_key=one) as mine,
        JobsClient(cluster.gateway.address, api_key=other) as theirs,
    ):
        ids = {client: [(await client.submit(submission())).job_id for _ in range(3)] for client in (mine, theirs)}
        token = (await mine.jobs(ListJobsRequest(page_size=1))).next_page_token
        page = await theirs.jobs(ListJobsRequest(page_token=token))
        assert {job.job_id for job in page.jobs} <= set(ids[theirs])


async def test_idempotency_keys_are_a_tenant_s_own(tenants: Tenants) -> None:
    one, other, same = tenants.add("one"), tenants.add("other"), tenants.add("one")
    async with (
        tenants.gateway() as cluster,
        JobsClient(cluster.gateway.address, api_key=one) as mine,
        JobsClient(cluster.gateway.address, api_key=other) as theirs,
        JobsClient(cluster.gateway.address, api_key=same) as also_mine,
    ):
        first = await mine.submit(submission(idempotency_key="k"))
        assert (await also_mine.submit(submission(idempotency_key="k", tenant="one"))).job_id == first.job_id
        second = await theirs.submit(submission(idempotency_key="k"))
        assert second.job_id != first.job_id
        code, why = await refused(theirs.submit(submission(2, idempotency_key="k")))
        assert (code, second.job_id in why, first.job_id in why) == ("ALREADY_EXISTS", True, False)


async def test_what_a_submission_may_ask_for(tenants: Tenants) -> None:
    key = tenants.add("one", max_priority="standard", max_request_tokens=30, tokens_per_min=20)
    async with tenants.gateway() as cluster, JobsClient(cluster.gateway.address, api_key=key) as client:
        assert (await refused(client.submit(submission(tenant="other"))))[0] == "PERMISSION_DENIED"
        assert (await refused(client.submit(submission(priority=PRIORITY_INTERACTIVE))))[0] == "PERMISSION_DENIED"
        hidden = submission(2)
        hidden.requests[1].tenant = "other"
        assert (await refused(client.submit(hidden)))[0] == "PERMISSION_DENIED"
        large = SubmitJobRequest(requests=[build_request(prompt="p" * 10, sampling={"max_tokens": 15})])
        code, why = await refused(client.submit(large))
        assert (code, why) == ("INVALID_ARGUMENT", "prompt and output come to 25 tokens; allowed for you: 20")
        job = await client.submit(submission(priority=PRIORITY_BATCH))
        assert job.priority == PRIORITY_BATCH
        assert (await client.submit(submission())).priority == PRIORITY_STANDARD
        cluster.gateway.access.refused.clear()


@pytest.mark.parametrize(("most", "filled"), [("batch", PRIORITY_BATCH), ("interactive", PRIORITY_STANDARD)])
async def test_a_priority_that_is_not_said(tenants: Tenants, most: str, filled: Priority.ValueType) -> None:
    key = tenants.add("one", max_priority=most)
    async with tenants.gateway() as cluster, JobsClient(cluster.gateway.address, api_key=key) as client:
        assert (await client.submit(submission())).priority == filled


async def test_jobs_wait_for_their_tenant_s_limits_and_others_go_on(tenants: Tenants) -> None:
    """A tenant's job of many requests is over its limit at once, and takes no place from another tenant's."""
    slow, quick = tenants.add("slow", requests_per_min=4), tenants.add("quick")
    async with (
        tenants.gateway(max_running=2) as cluster,
        JobsClient(cluster.gateway.address, api_key=slow) as slow_client,
        JobsClient(cluster.gateway.address, api_key=quick) as quick_client,
    ):
        held = [await slow_client.submit(submission(20)) for _ in range(3)]
        for _ in range(5):
            job = await quick_client.submit(submission(10))
            assert (await ended(quick_client, job.job_id)).succeeded_count == 10
        counts = [(await slow_client.job(job.job_id)).succeeded_count for job in held]
        assert sum(counts) == 4
        assert cluster.gateway.load.active == 0


async def test_a_job_runs_so_many_requests_at_once(tenants: Tenants) -> None:
    running = most = 0

    async def script(request: Any, context: Any) -> None:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.05)
        running -= 1
        await says("hello")(request, context)

    key = tenants.add("one", running=3, max_request_s=0.001)  # of jobs there is no such limit: they have deadlines
    async with tenants.gateway(script) as cluster, JobsClient(cluster.gateway.address, api_key=key) as client:
        job = await client.submit(submission(20))
        begun_s = time.monotonic()
        assert (await ended(client, job.job_id)).succeeded_count == 20
        assert most == 3
        assert time.monotonic() - begun_s < 5  # the next one begins as one ends


async def test_jobs_of_a_tenant_without_a_valid_key_wait(tenants: Tenants) -> None:
    one, other = tenants.add("one"), tenants.add("other")
    async with (
        tenants.gateway(hangs) as cluster,
        JobsClient(cluster.gateway.address, api_key=one) as client,
        JobsClient(cluster.gateway.address, api_key=other) as theirs,
    ):
        begun = await client.submit(submission())
        async with asyncio.timeout(5):
            while not (await client.job(begun.job_id)).output_tokens:
                await asyncio.sleep(0.01)
        revoked = tenants.records[0].model_copy(update={"revoked": tenants.records[0].created})
        tenants.records[0] = revoked
        tenants.write()
        async with asyncio.timeout(5):
            while cluster.gateway.access.limits_of("one") is not None:
                await asyncio.sleep(0.05)
        assert (await refused(client.job(begun.job_id)))[0] == "UNAUTHENTICATED"
        assert len(cluster.decodes[0].requests) == 1  # what has begun goes on
        assert cluster.decodes[0].cancelled == 0
        assert cluster.gateway.access.begin_job("one", 1, 1) == 5.0
        assert await theirs.submit(submission())


def test_held_jobs_are_released_in_time() -> None:
    class Job:
        def __init__(self, tenant: str) -> None:
            self.tenant = tenant

    held, jobs = HeldJobs(), [Job("a"), Job("a"), Job("b")]
    held.hold("a", 10.0)
    held.hold("b", 20.0)
    for job in jobs:
        held.add(job)  # pyright: ignore[reportArgumentType]
    assert (held.holds("a"), held.holds("c"), held.tenants) == (True, False, ["a", "b"])
    assert list(held.released(9.9)) == []
    held.remove(jobs[0])  # pyright: ignore[reportArgumentType]
    assert list(held.released(10.0)) == [jobs[1]]
    held.hold("b", 30.0)
    assert list(held.released(20.0)) == [jobs[2]]  # no later than it was to be
    held.hold("c", 0.0)  # nothing of it is held
    assert held.tenants == []


async def test_requests_of_kept_jobs_have_their_tenant(tenants: Tenants) -> None:
    one, other = tenants.add("one"), tenants.add("other")
    seen: list[GenerateRequest] = []
    async with tenants.gateway() as cluster:
        original = cluster.gateway.generator.resolve

        async def resolve(request: GenerateRequest) -> Any:
            seen.append(request)
            return await original(request)

        cluster.gateway.generator.resolve = resolve
        for key in (one, other):
            async with JobsClient(cluster.gateway.address, api_key=key) as client:
                await ended(client, (await client.submit(submission())).job_id)
        assert [request.tenant for request in seen] == ["one", "other"]
