"""A new job into the database: once for each idempotency key, and within its tenant's limits."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, insert, select, update

from ....proto.errors import AlreadyExists, Exhausted
from ....proto.jobs_pb2 import Job
from ..database.schema import EVENTS, JOBS, LABELS, REQUESTS, TENANTS
from ..database.writer import Tx
from ..settings import JobsSettings
from ..states import JobState
from .messages import job_of, state_event


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
    if new.idempotency_key and (found := _found(tx, new.tenant, new.idempotency_key)) is not None:
        return _same(found, new)
    bytes_in = sum(len(request.body) for request in new.requests)
    tokens = sum(request.prompt_tokens + request.max_tokens for request in new.requests)
    _count_in(tx, new.tenant, tokens, bytes_in, limits)
    row = _row(tx, new, tokens, bytes_in)
    tx.gathered[(new.tenant, new.idempotency_key)] = row
    tx.later(_NEW_JOB, [row])
    tx.later(_NEW_REQUEST, [_request_row(row["id"], *pair) for pair in enumerate(new.requests)])
    tx.later(_NEW_EVENT, [{"b_job_id": row["id"], "b_time_us": tx.now_us}])
    labels = [{"job_id": row["id"], "key": key, "value": value} for key, value in new.labels.items()]
    if labels:
        tx.later(_NEW_LABEL, labels)
    tx.events.append((row["id"], state_event(1, tx.now_us, JobState.QUEUED)))
    return job_of(row)


def _found(tx: Tx, tenant: str, key: str) -> Any:
    """The row of the job with this key, which may be one that this transaction brings."""
    if (tenant, key) in tx.gathered:
        return tx.gathered[(tenant, key)]
    return tx.unflushed.execute(_WITH_KEY, {"b_tenant": tenant, "b_key": key}).mappings().first()


def _same(found: Any, new: NewJob) -> Job:
    if bytes(found["body_hash"]) != new.body_hash:
        raise AlreadyExists(
            f"idempotency key {new.idempotency_key!r} belongs to job {found['id']}, which was submitted with other "
            "content: use a new key for a new job"
        )
    return job_of(found)


def _count_in(tx: Tx, tenant: str, tokens: int, bytes_in: int, limits: JobsSettings) -> None:
    """Adds a job to its tenant's counts; Exhausted, and nothing is added, where one is over its limit."""
    before = _counts(tx, tenant, limits.max_tenants)
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
    if before.pop("is_new", False):
        tx.unflushed.execute(insert(TENANTS), {"tenant": tenant, **before})
    before |= after
    added = {"b_tokens": tokens, "b_bytes": bytes_in}
    tx.later(_COUNT_IN, [{"b_tenant": tenant, **added}])


def _counts(tx: Tx, tenant: str, max_tenants: int) -> dict[str, Any]:
    """The counts of a tenant as this transaction has left them; `is_new` where it has no row yet.

    Exhausted where it is new and there are too many: anybody can name a tenant.
    """
    if tenant not in tx.gathered:
        found = tx.connection.execute(_OF_TENANT, {"b_tenant": tenant}).mappings().first()
        counts = dict(found or {"active_jobs": 0, "queued_tokens": 0, "stored_bytes": 0})
        if found is None:
            if (tenants := tx.unflushed.execute(_TENANTS).scalar_one()) >= max_tenants:
                raise Exhausted(f"{tenants} tenants have jobs here; allowed: at most {max_tenants}: delete ended jobs")
            counts["is_new"] = True
        tx.gathered[tenant] = counts
    return tx.gathered[tenant]


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


# Built once: building a statement costs more than executing it.
_NEW_JOB, _NEW_REQUEST, _NEW_LABEL = insert(JOBS), insert(REQUESTS), insert(LABELS)
_NEW_EVENT = insert(EVENTS).values(
    job_id=bindparam("b_job_id"), number=1, time_us=bindparam("b_time_us"), state=JobState.QUEUED.value
)
_WITH_KEY = select(JOBS).where(JOBS.c.tenant == bindparam("b_tenant"), JOBS.c.idempotency_key == bindparam("b_key"))
_OF_TENANT = select(TENANTS).where(TENANTS.c.tenant == bindparam("b_tenant")).with_for_update()
_TENANTS = select(func.count()).select_from(TENANTS)
_COUNT_IN = (
    update(TENANTS)
    .where(TENANTS.c.tenant == bindparam("b_tenant"))
    .values(
        active_jobs=TENANTS.c.active_jobs + 1,
        queued_tokens=TENANTS.c.queued_tokens + bindparam("b_tokens"),
        stored_bytes=TENANTS.c.stored_bytes + bindparam("b_bytes"),
    )
)
