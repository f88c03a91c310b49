"""A new job into the database: once for each idempotency key, and within its tenant's limits."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, update

from ...proto.errors import AlreadyExists, Exhausted
from ...proto.jobs_pb2 import Job
from .rows import job_of, state_event
from .schema import EVENTS, JOBS, LABELS, REQUESTS, TENANTS
from .settings import JobsSettings
from .states import JobState
from .writer import Tx


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """One request of a job, checked and complete: it has a seed."""

    body: bytes  # GenerateRequest
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A submission, checked."""

    tenant: str
    priority: int
    idempotency_key: str  # "": none
    body_hash: bytes  # of all that makes it this job and no other
    fingerprint: str
    labels: Mapping[str, str]
    deadline_us: int | None
    retention_us: int
    requests: Sequence[NewRequest]


def submit(tx: Tx, new: NewJob, limits: JobsSettings) -> Job:
    """The job as it is kept; the one that is there already, where the key was used for the same submission.

    AlreadyExists where the key was used for another one; Exhausted where the tenant has no room.
    """
    if new.idempotency_key:
        same = (JOBS.c.tenant == new.tenant) & (JOBS.c.idempotency_key == new.idempotency_key)
        found = tx.connection.execute(select(JOBS).where(same)).mappings().first()
        if found is not None:
            return _same(found, new)
    bytes_in = sum(len(request.body) for request in new.requests)
    tokens = sum(request.prompt_tokens + request.max_tokens for request in new.requests)
    _count_in(tx, new.tenant, tokens, bytes_in, limits)
    row = _row(tx, new, tokens, bytes_in)
    tx.connection.execute(insert(JOBS), row)
    tx.connection.execute(insert(REQUESTS), [_request_row(row["id"], *pair) for pair in enumerate(new.requests)])
    tx.connection.execute(
        insert(EVENTS),
        {"job_id": row["id"], "number": 1, "time_us": tx.now_us, "state": JobState.QUEUED.value},
    )
    if new.labels:
        tx.connection.execute(
            insert(LABELS), [{"job_id": row["id"], "key": key, "value": value} for key, value in new.labels.items()]
        )
    tx.events.append((row["id"], state_event(1, tx.now_us, JobState.QUEUED)))
    return job_of(row)


def _same(found: Any, new: NewJob) -> Job:
    if bytes(found["body_hash"]) != new.body_hash:
        raise AlreadyExists(
            f"idempotency key {new.idempotency_key!r} belongs to job {found['id']}, which was submitted with other "
            "content: use a new key for a new job"
        )
    return job_of(found)


def _count_in(tx: Tx, tenant: str, tokens: int, bytes_in: int, limits: JobsSettings) -> None:
    """Adds a job to its tenant's counts; Exhausted, and nothing is added, where one is over its limit."""
    query = select(TENANTS).where(TENANTS.c.tenant == tenant).with_for_update()
    found = tx.connection.execute(query).mappings().first()
    before = dict(found) if found is not None else {"active_jobs": 0, "queued_tokens": 0, "stored_bytes": 0}
    after = {
        "active_jobs": before["active_jobs"] + 1,
        "queued_tokens": before["queued_tokens"] + tokens,
        "stored_bytes": before["stored_bytes"] + bytes_in,
    }
    who = f"tenant {tenant!r}" if tenant else "the default tenant"
    for name, limit, what, way_out in (
        ("active_jobs", limits.max_jobs, "jobs that have not ended", "wait for some to end"),
        ("queued_tokens", limits.max_queued_tokens, "queued tokens", "wait for jobs to end"),
        ("stored_bytes", limits.max_stored_bytes, "stored bytes", "delete jobs that have ended"),
    ):
        if after[name] > limit:
            raise Exhausted(f"{who} would have {after[name]} {what}; allowed: at most {limit}: {way_out}")
    if found is None:
        tx.connection.execute(insert(TENANTS), {"tenant": tenant, **after})
    else:
        tx.connection.execute(update(TENANTS).where(TENANTS.c.tenant == tenant).values(after))


def _row(tx: Tx, new: NewJob, tokens: int, bytes_in: int) -> dict[str, Any]:
    return {
        "id": f"{tx.now_us:x}-{secrets.token_hex(8)}",  # by time, so that new rows lie side by side
        "tenant": new.tenant,
        "idempotency_key": new.idempotency_key or None,
        "body_hash": new.body_hash,
        "fingerprint": new.fingerprint,
        "state": JobState.QUEUED.value,
        "priority": new.priority,
        "owner": None,
        "resumes": 0,
        "labels": json.dumps(dict(new.labels), sort_keys=True),
        "created_us": tx.now_us,
        "started_us": None,
        "ended_us": None,
        "deadline_us": new.deadline_us,
        "retention_us": new.retention_us,
        "expire_us": None,
        "request_count": len(new.requests),
        "succeeded": 0,
        "failed": 0,
        "prompt_tokens": sum(request.prompt_tokens for request in new.requests),
        "output_tokens": 0,
        "queued_tokens": tokens,
        "stored_bytes": bytes_in,
        "last_event": 1,
        "error_code": None,
        "error_message": None,
    }


def _request_row(job_id: str, item: int, request: NewRequest) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "item": item,
        "state": JobState.QUEUED.value,
        "body": request.body,
        "prompt_tokens": request.prompt_tokens,
        "cost_tokens": request.prompt_tokens + request.max_tokens,
        "result": None,
    }
