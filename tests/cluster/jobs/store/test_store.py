"""What the database of jobs does when it is full, locked, foreign or shared: errors that say so, and no lost job."""

import asyncio
import sqlite3
from pathlib import Path

import grpc
import grpc.aio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from served_jobs import jobs_server, sqlite_url
from sqlalchemy import select, text

from isthmus.cluster.jobs.database.database import Database
from isthmus.cluster.jobs.database.migrate import migrate
from isthmus.cluster.jobs.database.schema import EVENTS, JOBS, LABELS, METADATA, REQUESTS, TENANTS
from isthmus.cluster.jobs.database.writer import Tx, Writer
from isthmus.cluster.jobs.settings import JobsSettings, database_url
from isthmus.cluster.jobs.states import OPEN, TRANSITIONS, JobState, check_transition
from isthmus.cluster.jobs.store.progress import Progress
from isthmus.cluster.jobs.store.store import JobStore
from isthmus.cluster.jobs.store.submit import NewJob, NewRequest
from isthmus.proto import jobs_pb2
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_STANDARD, SamplingParams
from isthmus.proto.errors import Exhausted, IllegalState, Incompatible, InvalidRequest, Unavailable
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.jobs_pb2 import (
    CancelJobRequest,
    DeleteJobRequest,
    GetJobRequest,
    Job,
    JobOutput,
    SubmitJobRequest,
)


def new_job(*, tenant: str = "", key: str = "", body: bytes = b"x", priority: int = PRIORITY_STANDARD) -> NewJob:
    return NewJob(
        tenant=tenant,
        priority=priority,
        idempotency_key=key,
        body_hash=body,
        fingerprint="f",
        labels={"a": "b"},
        deadline_us=None,
        retention_us=10**12,
        requests=[NewRequest(body=body, prompt_tokens=10, max_tokens=20)],
    )


async def opened(url: str, **settings: float) -> JobStore:
    return await JobStore.open(url, JobsSettings(**settings))  # pyright: ignore[reportArgumentType]


def submission(prompt: str = "p", **fields: object) -> SubmitJobRequest:
    request = GenerateRequest(prompt=prompt, sampling=SamplingParams(max_tokens=5, seed=1))
    return SubmitJobRequest(requests=[request], **fields)  # pyright: ignore[reportArgumentType]


async def forever(request: GenerateRequest, position: int) -> None:
    await asyncio.Event().wait()


async def refused(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call  # pyright: ignore[reportGeneralTypeIssues]
    return raised.value.code(), raised.value.details() or ""


def test_states_are_those_of_the_wire() -> None:
    on_the_wire = {name.removeprefix("JOB_STATE_"): value for name, value in jobs_pb2.JobState.items() if value}
    assert {state.name: state.value for state in JobState} == on_the_wire


@pytest.mark.parametrize("now", JobState)
@pytest.mark.parametrize("then", JobState)
def test_only_transitions_of_the_table_are_legal(now: JobState, then: JobState) -> None:
    legal = {
        ("QUEUED", "RUNNING"),
        ("QUEUED", "CANCELLED"),
        ("QUEUED", "EXPIRED"),
        ("RUNNING", "SUCCEEDED"),
        ("RUNNING", "FAILED"),
        ("RUNNING", "CANCELLED"),
        ("RUNNING", "EXPIRED"),
    }
    if (now.name, then.name) in legal:
        check_transition("j", now, then)
    else:
        with pytest.raises(IllegalState, match=f"job j is {now.name} and cannot become {then.name}; allowed: "):
            check_transition("j", now, then)
    assert (now in OPEN) == bool(TRANSITIONS[now]) == (not now.ended)


def test_migrations_make_the_tables_of_the_schema(url: str) -> None:
    database = Database(url)
    migrate(database)
    migrate(database)
    with database.write() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    database.close()


async def test_a_newer_schema_is_refused(url: str) -> None:
    database = Database(url)
    migrate(database)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(Incompatible, match="has schema 9999, newer than 0001 of this isthmus: upgrade isthmus"):
        await opened(url)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("jobs.db", "is not a database URL; allowed: sqlite:////path"),
        ("sqlite://", "jobs in memory would be lost"),
        ("nosuch://x/y", "no database nosuch://x/y"),
    ],
)
def test_bad_urls(bad: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        Database(bad)


async def test_a_database_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="cannot be used"):
        await opened("postgresql://nobody@127.0.0.1:1/none")


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"this is no database, it only has its name" * 100)
    with pytest.raises(Unavailable, match="file is not a database"):
        await opened(sqlite_url(tmp_path))


def test_the_database_is_the_named_one_or_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert database_url("sqlite:////file") == "sqlite:////file"
    assert database_url("none") is None
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert database_url(None) == "sqlite:////state/isthmus/jobs.db"


async def test_limits_of_a_tenant(url: str) -> None:
    async with jobs_server(url, forever, max_jobs=2, max_queued_tokens=20, max_stored_bytes=3000) as server:
        first = await server.stub.SubmitJob(submission(tenant="t"))
        code, details = await refused(server.stub.SubmitJob(submission("p" * 10, tenant="t")))
        assert (code, details) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "tenant 't' would have 21 queued tokens; allowed: at most 20: wait for jobs to end",
        )
        second = await server.stub.SubmitJob(submission(tenant="t"))
        code, details = await refused(server.stub.SubmitJob(submission(tenant="t")))
        assert (code, details) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "tenant 't' would have 3 jobs that have not ended; allowed: at most 2: wait for some to end",
        )
        await server.stub.SubmitJob(submission(tenant="u"))  # others' limits are their own
        await server.stub.CancelJob(CancelJobRequest(job_id=first.job_id))
        await server.stub.SubmitJob(submission(tenant="t"))
        for job_id in (second.job_id,):
            await server.stub.CancelJob(CancelJobRequest(job_id=job_id))
        long = submission(tenant="t", labels={})
        long.requests[0].sampling.stop.extend(["s" * 250] * 14)
        code, details = await refused(server.stub.SubmitJob(long))
        assert (code, "stored bytes; allowed: at most 3000: delete jobs that have ended" in details) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            True,
        )


async def test_what_is_forgotten_leaves_nothing_behind(url: str) -> None:
    async with jobs_server(url) as server:
        kept = await server.stub.SubmitJob(submission())
        ids = [(await server.stub.SubmitJob(submission(labels={"n": str(n)}))).job_id for n in range(3)]
        short = submission()
        short.retention.FromMilliseconds(100)
        expired = await server.stub.SubmitJob(short)
        for job_id in (kept.job_id, *ids):
            await server.ended(job_id)
        for job_id in ids:
            await server.stub.DeleteJob(DeleteJobRequest(job_id=job_id))
        database = Database(url)
        try:
            async with asyncio.timeout(10):
                while True:
                    with database.read() as connection:
                        left = set(connection.execute(select(JOBS.c.id)).scalars())
                    if left == {kept.job_id}:
                        break
                    await asyncio.sleep(0.05)
            with database.read() as connection:
                for table in (EVENTS, REQUESTS):
                    assert set(connection.execute(select(table.c.job_id)).scalars()) == {kept.job_id}
                assert connection.execute(select(LABELS)).all() == []
                counts = connection.execute(select(TENANTS)).mappings().one()
                stored = connection.execute(select(JOBS.c.stored_bytes)).scalar_one()
            assert (counts["active_jobs"], counts["queued_tokens"], counts["stored_bytes"]) == (0, 0, stored)
        finally:
            database.close()
        assert (await refused(server.stub.GetJob(GetJobRequest(job_id=expired.job_id))))[0] is grpc.StatusCode.NOT_FOUND


async def test_a_locked_database_is_unavailable_and_keeps_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.cluster.jobs.database.database.BUSY_S", 0.1)
    goes_on = asyncio.Event()

    async def before(request: GenerateRequest, position: int) -> None:
        if position == 2:
            await goes_on.wait()

    async with jobs_server(sqlite_url(tmp_path), before, lease_s=30) as server:
        job = await server.stub.SubmitJob(submission())
        while (await server.stub.GetJob(GetJobRequest(job_id=job.job_id))).output_tokens < 2:
            await asyncio.sleep(0.01)
        other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        code, details = await refused(server.stub.SubmitJob(submission()))
        assert (code, "is locked by another program" in details) == (grpc.StatusCode.UNAVAILABLE, True)
        goes_on.set()  # three more tokens and the end are made while nothing can be written
        await asyncio.sleep(0.3)
        assert (await server.stub.GetJob(GetJobRequest(job_id=job.job_id))).output_tokens == 2
        other.execute("ROLLBACK")
        other.close()
        ended = await server.ended(job.job_id)
        assert (ended.output_tokens, ended.succeeded_count) == (5, 1)
        assert len(server.generator.asked) == 1


async def test_a_full_database_is_exhausted_and_keeps_the_output(tmp_path: Path) -> None:
    async with jobs_server(sqlite_url(tmp_path)) as server:

        def limit(tx: Tx) -> None:
            pages = tx.connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            tx.connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 4}")

        await server.jobs._store._writer.run(limit)
        accepted: list[str] = []
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            while len(accepted) < 1000:
                accepted.append((await server.stub.SubmitJob(submission("long " * 100))).job_id)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "is full" in (raised.value.details() or "")
        await server.jobs._store._writer.run(
            lambda tx: tx.connection.exec_driver_sql("PRAGMA max_page_count = 1000000").scalar_one()
        )
        for job_id in accepted:
            assert (await server.ended(job_id)).output_tokens == 5


async def test_a_change_that_fails_does_not_fail_its_neighbours(url: str) -> None:
    database = Database(url)
    migrate(database)
    writer = Writer(database, lambda events: None)
    writer.start()

    def bad(tx: Tx) -> None:
        tx.connection.execute(text("INSERT INTO tenants VALUES ('x', 1, 1, 1)"))
        raise KeyError("a bug")

    def good(tx: Tx) -> int:
        tx.connection.execute(text("INSERT INTO tenants VALUES ('y', 1, 1, 1)"))
        return 7

    def refusing(tx: Tx) -> None:
        raise Exhausted("no room")

    outcomes = await asyncio.gather(*(writer.run(c) for c in (bad, good, refusing)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["'a bug'", "7", "no room"]
    with database.read() as connection:
        assert connection.execute(select(TENANTS.c.tenant)).scalars().all() == ["y"]
    await writer.stop()
    with pytest.raises(Unavailable, match="shutting down"):
        await writer.run(good)
    database.close()


async def test_only_the_owner_writes_progress(url: str) -> None:
    store = await opened(url, lease_s=0.2)
    job = await store.submit(new_job())
    await store.join("old", "host:1")
    (claimed,) = await store.claim("old", "f", [PRIORITY_STANDARD], 10)
    assert (claimed.job_id, claimed.has_output) == (job.job_id, False)
    made = Progress(job_id=job.job_id, item=0, outputs=[JobOutput(text="a", token_ids=[97])])
    assert await store.record("old", [made]) == frozenset()
    await store.join("new", "host:2")
    assert await store.claim("new", "f", [PRIORITY_STANDARD], 10) == []
    await asyncio.sleep(0.3)  # "old" is silent for longer than its lease
    await store.join("third", "host:3")
    assert await store.renew("third")
    (taken,) = await store.claim("new", "f", [PRIORITY_STANDARD], 10)
    assert (taken.job_id, taken.has_output) == (job.job_id, True)
    assert await store.record("old", [made]) == {job.job_id}  # it wakes up, and is refused
    assert not await store.renew("old")
    now = await store.job(job.job_id)
    assert (now.output_tokens, now.resumes) == (1, 1)
    assert [output.text for output in await store.outputs(job.job_id, 0)] == ["a"]
    await store.close()


async def test_a_gateway_at_the_same_address_takes_over_at_once(url: str) -> None:
    store = await opened(url, lease_s=1000)
    job = await store.submit(new_job())
    await store.join("old", "host:1")
    await store.claim("old", "f", [PRIORITY_STANDARD], 10)
    await store.join("new", "host:1")
    assert [c.job_id for c in await store.claim("new", "f", [PRIORITY_STANDARD], 10)] == [job.job_id]
    await store.close()


async def test_jobs_are_claimed_by_model_class_and_age(url: str) -> None:
    store = await opened(url)
    await store.join("g", "host:1")
    batch, *standard = [
        (await store.submit(new_job(priority=priority))).job_id
        for priority in (PRIORITY_BATCH, PRIORITY_STANDARD, PRIORITY_STANDARD)
    ]
    assert await store.claim("g", "another model", [PRIORITY_STANDARD, PRIORITY_BATCH], 10) == []
    assert [c.job_id for c in await store.claim("g", "f", [PRIORITY_STANDARD, PRIORITY_BATCH], 1)] == standard[:1]
    rest = await store.claim("g", "f", [PRIORITY_STANDARD, PRIORITY_BATCH], 10)
    assert [c.job_id for c in rest] == [standard[1], batch]
    assert (await store.job(batch)).state == jobs_pb2.JOB_STATE_RUNNING
    await store.close()


async def test_two_gateways_race_for_one_key(url: str) -> None:
    stores = [await opened(url) for _ in range(2)]
    for number in range(10):
        jobs: list[Job] = await asyncio.gather(*(store.submit(new_job(key=f"k{number}")) for store in stores))
        assert len({job.job_id for job in jobs}) == 1
    for store in stores:
        await store.close()
