"""No call of the database of jobs waits for ever, and no tenant's row stays for ever."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from isthmus.cluster.jobs.database import database as under_test
from isthmus.cluster.jobs.database.database import Database
from isthmus.cluster.jobs.database.schema import TENANTS
from isthmus.cluster.jobs.settings import JobsSettings
from isthmus.cluster.jobs.store.store import JobStore
from isthmus.cluster.jobs.store.submit import NewJob, NewRequest
from isthmus.proto.common_pb2 import PRIORITY_STANDARD
from isthmus.proto.errors import Exhausted, Unavailable


def new_job(tenant: str) -> NewJob:
    return NewJob(
        tenant=tenant,
        priority=PRIORITY_STANDARD,
        idempotency_key="",
        body_hash=b"x",
        fingerprint="f",
        labels={},
        deadline_us=None,
        retention_us=10**12,
        requests=[NewRequest(body=b"x", prompt_tokens=10, max_tokens=20)],
    )


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, silent_server: int) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr(under_test, "CONNECT_S", 2)
    database = Database(f"postgresql://user@127.0.0.1:{silent_server}/jobs")
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match="cannot be used"), database.read():
        pass
    assert time.monotonic() - started_s < 30
    database.close()


def test_what_the_url_says_wins() -> None:
    url = under_test._checked("postgresql://h/jobs?connect_timeout=3&options=-c%20statement_timeout%3D5s")
    arguments = under_test._server_arguments(url)
    assert "connect_timeout" not in arguments
    assert arguments["options"].endswith("-c statement_timeout=5s")
    assert under_test._server_arguments(under_test._checked("sqlite:////tmp/jobs.db")) == {}


def test_a_statement_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(under_test, "STATEMENT_S", 1)
    database = Database(url)
    if database.is_sqlite:
        pytest.skip("SQLite runs in this process: make test-postgres")
    with pytest.raises(Unavailable) as caught, database.read() as connection:
        connection.execute(text("SELECT pg_sleep(600)"))
    assert "statement timeout" in caught.value.private
    database.close()


def test_a_pool_that_is_used_up_is_unavailable(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(under_test, "POOL_S", 0.05)
    database, release, held = Database(url), threading.Event(), threading.Event()

    def hold() -> None:
        with database.write():
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(30)
        with pytest.raises(Unavailable, match="no connection for"), database.write():
            pass
    finally:
        release.set()
        holder.join()
        database.close()


async def test_a_tenant_whose_last_job_is_erased_leaves_nothing(url: str) -> None:
    store = await JobStore.open(url, JobsSettings())
    kept, gone = await store.submit(new_job("kept")), await store.submit(new_job("gone"))
    for job in (kept, gone):
        await store.cancel(job.job_id)
    second = await store.submit(new_job("kept"))
    for job in (kept, gone):
        await store.forget(job.job_id)
    await erase(store)
    assert await tenants(store) == {"kept": (1, True)}
    await store.cancel(second.job_id)
    await store.forget(second.job_id)
    await erase(store)
    assert await tenants(store) == {}
    await store.submit(new_job("gone"))
    assert await tenants(store) == {"gone": (1, True)}
    await store.close()


async def test_so_many_tenants_may_have_jobs(url: str) -> None:
    store = await JobStore.open(url, JobsSettings(max_tenants=2))
    first = await store.submit(new_job("a"))
    await store.submit(new_job("b"))
    with pytest.raises(Exhausted, match="2 tenants have jobs here"):
        await store.submit(new_job("c"))
    await store.submit(new_job("b"))
    await store.cancel(first.job_id)
    await store.forget(first.job_id)
    await erase(store)
    await store.submit(new_job("c"))
    await store.close()


async def test_a_submission_that_is_refused_leaves_no_tenant(url: str) -> None:
    store = await JobStore.open(url, JobsSettings(max_queued_tokens=1))
    with pytest.raises(Exhausted, match="queued tokens"):
        await store.submit(new_job("refused"))
    assert await tenants(store) == {}
    await store.close()


async def erase(store: JobStore) -> None:
    while await store.erase():
        pass


async def tenants(store: JobStore) -> dict[str, tuple[int, bool]]:
    """Active jobs, and whether anything is stored, by tenant."""
    columns = TENANTS.c.tenant, TENANTS.c.active_jobs, func.coalesce(TENANTS.c.stored_bytes, 0)
    rows = await store._read(lambda connection: connection.execute(select(*columns)).all())
    return {tenant: (active, stored > 0) for tenant, active, stored in rows}


def test_a_file_of_jobs_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "state" / "jobs.db"
    file.parent.mkdir()
    (file.parent / "jobs.db").touch(0o644)
    database = Database(f"sqlite:///{file}")
    with database.write() as connection:
        connection.execute(text("CREATE TABLE t (x INTEGER)"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
    database.close()
    assert set(modes.values()) == {0o600} and "jobs.db-wal" in modes
