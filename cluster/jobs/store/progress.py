"""How jobs go on in the database: recorded output, ended requests, new states. Only a job's owner writes progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, bindparam, insert, select, update

from ....proto.errors import NotFound, shown
from ....proto.jobs_pb2 import Job, JobError, JobEvent, JobOutput
from ..database.schema import EVENTS, JOBS, REQUESTS, TENANTS
from ..database.writer import Tx
from ..states import JobState, check_transition
from .messages import job_of, state_event, timestamp

KEPT = JOBS.c.expire_us.is_(None) | (JOBS.c.expire_us > 0)
ROW_BYTES = 48  # of an event beside its body, for the count of stored bytes


@dataclass(kw_only=True)
class Progress:
    """What one request of a job has made since its last progress."""

    job_id: str
    item: int
    outputs: list[JobOutput] = field(default_factory=list)  # in order
    ended: JobState | None = None
    result: bytes = b""  # JobResult, once ended
    cost_tokens: int = 0  # of the request, once ended
    error: JobError | None = None


def record(tx: Tx, owner: str, made: Sequence[Progress]) -> frozenset[str]:
    """Records progress as events, and ends jobs whose last request has ended.

    Returns the jobs that are not (or no longer) the owner's: of them nothing was recorded.
    """
    by_job: dict[str, list[Progress]] = {}
    for progress in made:
        by_job.setdefault(progress.job_id, []).append(progress)
    owned = JOBS.c.id.in_(by_job) & (JOBS.c.owner == owner)
    rows = tx.connection.execute(select(JOBS).where(owned).order_by(JOBS.c.id).with_for_update()).mappings().all()
    changes = [_Change(tx, row) for row in rows]
    for change in changes:
        for progress in by_job[change.job_id]:
            change.add(progress)
    _write(tx, changes, [progress for row in rows for progress in by_job[row["id"]] if progress.ended])
    return frozenset(by_job) - {row["id"] for row in rows}


def start(tx: Tx, rows: Sequence[Mapping[Any, Any]], owner: str) -> None:
    """Gives jobs, as rows that this transaction holds, to an owner; queued ones are running from then on."""
    changes = [_Change(tx, row, owner) for row in rows]
    for change, row in zip(changes, rows, strict=True):
        if row["state"] == JobState.QUEUED:
            change.enter(JobState.RUNNING)
    _write(tx, changes, [])


def end(tx: Tx, rows: Sequence[Mapping[Any, Any]], state: JobState, error: JobError | None = None) -> None:
    """Ends jobs, as rows that this transaction holds, before all their requests have; IllegalState of ended ones."""
    for row in rows:
        check_transition(row["id"], JobState(row["state"]), state)
    changes = [_Change(tx, row) for row in rows]
    for change in changes:
        change.blame(error)
        change.enter(state)
    _write(tx, changes, [])
    unfinished = REQUESTS.c.job_id.in_([row["id"] for row in rows]) & (REQUESTS.c.state == JobState.QUEUED.value)
    tx.connection.execute(update(REQUESTS).where(unfinished).values(state=state.value))


def fail(tx: Tx, job_id: str, owner: str, error: JobError) -> None:
    """Ends a job of this owner as FAILED; NotFound, or IllegalState where it has ended."""
    row = locked_row(tx, job_id)
    if row["owner"] == owner:
        end(tx, [row], JobState.FAILED, error)


def cancel(tx: Tx, job_id: str, tenant: str | None = None) -> Job:
    """Ends a job as CANCELLED; NotFound as `locked_row`, or IllegalState where it has ended."""
    end(tx, [locked_row(tx, job_id, tenant)], JobState.CANCELLED)
    return job_of(locked_row(tx, job_id))


def expire(tx: Tx) -> int:
    """Ends all jobs whose deadline has passed; how many."""
    over = (JOBS.c.deadline_us <= tx.now_us) & JOBS.c.ended_us.is_(None)
    rows = tx.connection.execute(select(JOBS).where(over).order_by(JOBS.c.id).with_for_update()).mappings().all()
    end(tx, rows, JobState.EXPIRED)
    return len(rows)


def locked_row(tx: Tx, job_id: str, tenant: str | None = None) -> Mapping[Any, Any]:
    """The row of a job, locked for this transaction; NotFound where there is none, or it is another tenant's."""
    row = tx.connection.execute(select(JOBS).where(seen(job_id, tenant)).with_for_update()).mappings().first()
    if row is None:
        raise no_job(job_id)
    return row


def seen(job_id: str, tenant: str | None) -> ColumnElement[bool]:
    """The condition for a job that is kept, and that a tenant may see: its own; None sees all."""
    wanted = (JOBS.c.id == job_id) & KEPT
    return wanted if tenant is None else wanted & (JOBS.c.tenant == tenant)


def no_job(job_id: str) -> NotFound:
    """What is said of a job that is not there, and of one that the caller may not know of."""
    return NotFound(f"no job {shown(job_id)}: it was never here, was deleted, or its retention is over")


class _Change:
    """One job's new events and values."""

    def __init__(self, tx: Tx, row: Mapping[Any, Any], owner: str | None = None) -> None:
        self._tx = tx
        self.job_id: str = row["id"]
        self.tenant: str = row["tenant"]
        self.counts = {"active_jobs": 0, "queued_tokens": 0, "stored_bytes": 0}  # of the tenant, to add
        self.events: list[dict[str, Any]] = []
        self._row = row
        self._state = JobState(row["state"])
        copied = ("started_us", "ended_us", "expire_us", "succeeded", "failed", "output_tokens", "last_event")
        self._values = {name: row[name] for name in (*copied, "queued_tokens", "error_code", "error_message")}
        self._values["owner"] = owner or row["owner"]

    def add(self, progress: Progress) -> None:
        """Output and end of one request; the last one to end ends the job."""
        values = self._values
        for output in progress.outputs:
            body = output.SerializeToString()
            values["output_tokens"] += len(output.token_ids)
            self.counts["stored_bytes"] += len(body) + ROW_BYTES
            number = self._event(item=output.request_index, body=body)
            event = JobEvent(number=number, time=timestamp(self._tx.now_us), output=output)
            self._tx.events.append((self.job_id, event))
        if progress.ended is None:
            return
        values["succeeded" if progress.ended is JobState.SUCCEEDED else "failed"] += 1
        values["queued_tokens"] -= progress.cost_tokens
        self.counts["queued_tokens"] -= progress.cost_tokens
        self.counts["stored_bytes"] += len(progress.result)
        self.blame(progress.error)
        if values["succeeded"] + values["failed"] == self._row["request_count"]:
            self.enter(JobState.FAILED if values["failed"] else JobState.SUCCEEDED)

    def blame(self, error: JobError | None) -> None:
        """Keeps the first error of the job."""
        if error is not None and self._values["error_code"] is None:
            message = error.message.replace("\0", "\N{REPLACEMENT CHARACTER}")  # PostgreSQL keeps no NUL
            self._values |= {"error_code": error.code, "error_message": message}

    def enter(self, state: JobState) -> None:
        """A new state, as an event."""
        check_transition(self.job_id, self._state, state)
        self._state, values, now_us = state, self._values, self._tx.now_us
        number = self._event(state=state.value)
        self._tx.events.append((self.job_id, state_event(number, now_us, state)))
        self.counts["stored_bytes"] += ROW_BYTES
        if state is JobState.RUNNING:
            values["started_us"] = now_us
        if state.ended:
            self.counts["active_jobs"] -= 1
            self.counts["queued_tokens"] -= values["queued_tokens"]
            values |= {"owner": None, "ended_us": now_us, "queued_tokens": 0}
            values["expire_us"] = now_us + self._row["retention_us"]

    def values(self) -> dict[str, Any]:
        """For `_UPDATE_JOB`."""
        stored = self._row["stored_bytes"] + self.counts["stored_bytes"]
        new = {**self._values, "state": self._state.value, "stored_bytes": stored}
        return {"b_id": self.job_id, **{f"b_{name}": value for name, value in new.items()}}

    def _event(self, *, state: int | None = None, item: int | None = None, body: bytes | None = None) -> int:
        number = self._values["last_event"] = self._values["last_event"] + 1
        row = {"job_id": self.job_id, "number": number, "time_us": self._tx.now_us}
        self.events.append({**row, "state": state, "item": item, "body": body})
        return number


def _write(tx: Tx, changes: Sequence[_Change], ended: Sequence[Progress]) -> None:
    events = [event for change in changes for event in change.events]
    if events:
        tx.connection.execute(insert(EVENTS), events)
    if changes:
        tx.connection.execute(_UPDATE_JOB, [change.values() for change in changes])
    if ended:
        tx.connection.execute(_END_REQUEST, [_ended(progress) for progress in ended])
    count(tx, [(change.tenant, change.counts) for change in changes])


def count(tx: Tx, counts: Sequence[tuple[str, Mapping[str, int]]]) -> None:
    """Adds to the counts of tenants."""
    sums: dict[str, dict[str, int]] = {}
    for tenant, added in counts:
        total = sums.setdefault(tenant, dict.fromkeys(_COUNTS, 0))
        for name, value in added.items():
            total[name] += value
    rows = [{"b_tenant": tenant, **{f"b_{name}": sums[tenant][name] for name in _COUNTS}} for tenant in sorted(sums)]
    if rows:
        tx.connection.execute(_COUNT_TENANT, rows)


def _ended(progress: Progress) -> dict[str, Any]:
    assert progress.ended is not None
    named = {"b_job_id": progress.job_id, "b_item": progress.item, "b_state": progress.ended.value}
    return {**named, "b_result": progress.result}


_COUNTS = ("active_jobs", "queued_tokens", "stored_bytes")
_COUNT_TENANT = (
    update(TENANTS)
    .where(TENANTS.c.tenant == bindparam("b_tenant"))
    .values({name: TENANTS.c[name] + bindparam(f"b_{name}") for name in _COUNTS})
)
_JOB_VALUES = (
    *("state", "owner", "started_us", "ended_us", "expire_us", "succeeded", "failed", "output_tokens"),
    *("queued_tokens", "stored_bytes", "last_event", "error_code", "error_message"),
)
_UPDATE_JOB = (
    update(JOBS).where(JOBS.c.id == bindparam("b_id")).values({name: bindparam(f"b_{name}") for name in _JOB_VALUES})
)
_END_REQUEST = (
    update(REQUESTS)
    .where((REQUESTS.c.job_id == bindparam("b_job_id")) & (REQUESTS.c.item == bindparam("b_item")))
    .values(state=bindparam("b_state"), result=bindparam("b_result"))
)
