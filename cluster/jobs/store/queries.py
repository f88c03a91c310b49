"""What can be asked of the database of jobs; nothing here changes it. Each takes a connection of `Database.read`."""

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, select, tuple_

from ....proto.errors import InvalidRequest, OutOfRange, shown
from ....proto.generation_pb2 import GenerateRequest
from ....proto.jobs_pb2 import Job, JobEvent, JobOutput, JobResult
from ..database.schema import EVENTS, JOBS, LABELS, REQUESTS
from ..states import JobState
from .messages import event_of, job_of
from .progress import KEPT, no_job, seen

RESULT_BYTES = 2 << 20  # of one page of results: well below the limit of a message
EVENT_PAGE = 500
MAX_TIME_US, MAX_ITEM = (1 << 63) - 1, (1 << 31) - 1  # what the columns hold


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Which jobs are wanted. None and empty: no condition."""

    tenant: str = ""
    states: Sequence[int] = ()
    labels: Mapping[str, str]
    created_after_us: int | None = None
    created_before_us: int | None = None
    limit: int
    page_token: str = ""


def get_job(connection: Connection, job_id: str, tenant: str | None = None) -> Job:
    """NotFound where there is none, or it is another tenant's; None: whoever's it is."""
    row = connection.execute(select(JOBS).where(seen(job_id, tenant))).mappings().first()
    if row is None:
        raise no_job(job_id)
    return job_of(row)


def list_jobs(connection: Connection, wanted: Listing) -> tuple[list[Job], str]:
    """A page of jobs, newest first, and the token of the next page; InvalidRequest for a bad token."""
    query = _filtered(select(JOBS).where(KEPT), wanted)
    if wanted.page_token:
        created, _, job_id = _opened(wanted.page_token).partition(" ")
        created_us = _number(created, MAX_TIME_US, wanted.page_token)
        query = query.where(tuple_(JOBS.c.created_us, JOBS.c.id) < tuple_(created_us, job_id))
    query = query.order_by(JOBS.c.created_us.desc(), JOBS.c.id.desc()).limit(wanted.limit + 1)
    rows = connection.execute(query).mappings().all()
    page = rows[: wanted.limit]
    more = len(rows) > wanted.limit
    token = _closed(f"{page[-1]['created_us']} {page[-1]['id']}") if more else ""
    return [job_of(row) for row in page], token


def _filtered(query: Select[Any], wanted: Listing) -> Select[Any]:
    if wanted.tenant:
        query = query.where(JOBS.c.tenant == wanted.tenant)
    if wanted.states:
        query = query.where(JOBS.c.state.in_(wanted.states))
    for key, value in wanted.labels.items():
        having = select(LABELS.c.job_id).where(LABELS.c.key == key, LABELS.c.value == value)
        query = query.where(JOBS.c.id.in_(having))
    if wanted.created_after_us is not None:
        query = query.where(JOBS.c.created_us > wanted.created_after_us)
    if wanted.created_before_us is not None:
        query = query.where(JOBS.c.created_us < wanted.created_before_us)
    return query


def get_events(
    connection: Connection, job_id: str, first: int, tenant: str | None = None
) -> tuple[Job, list[JobEvent]]:
    """The job, and its events from number `first` on, a page of them. NotFound as `get_job`, OutOfRange past the next
    one to come."""
    job = get_job(connection, job_id, tenant)
    if first > job.last_event + 1:
        raise OutOfRange(
            f"job {job_id} has {job.last_event} events, and cannot be watched from event {first}; "
            f"allowed: 0 to {job.last_event + 1}"
        )
    wanted = (EVENTS.c.job_id == job_id) & (EVENTS.c.number >= first)
    query = select(EVENTS).where(wanted).order_by(EVENTS.c.number).limit(EVENT_PAGE)
    return job, [event_of(row) for row in connection.execute(query).mappings()]


def last_events(connection: Connection, job_ids: Iterable[str]) -> dict[str, int]:
    """The number of the newest event of each job that is there."""
    query = select(JOBS.c.id, JOBS.c.last_event).where(JOBS.c.id.in_(list(job_ids)), KEPT)
    return {row.id: row.last_event for row in connection.execute(query)}


def owned_jobs(connection: Connection, owner: str) -> set[str]:
    """The jobs that a gateway runs."""
    return set(connection.execute(select(JOBS.c.id).where(JOBS.c.owner == owner)).scalars())


def waiting_requests(connection: Connection, job_id: str, after: int, limit: int) -> Sequence[Mapping[Any, Any]]:
    """Rows of requests that have not ended, in order, from the one after `after` on."""
    waiting = (REQUESTS.c.job_id == job_id) & (REQUESTS.c.state == JobState.QUEUED.value) & (REQUESTS.c.item > after)
    return connection.execute(select(REQUESTS).where(waiting).order_by(REQUESTS.c.item).limit(limit)).mappings().all()


def outputs_of(connection: Connection, job_id: str, item: int) -> list[JobOutput]:
    """What one request has made so far, in order."""
    wanted = (EVENTS.c.job_id == job_id) & (EVENTS.c.item == item)
    bodies = connection.execute(select(EVENTS.c.body).where(wanted).order_by(EVENTS.c.number)).scalars()
    return [JobOutput.FromString(body) for body in bodies]


def get_results(
    connection: Connection, job_id: str, limit: int, page_token: str, tenant: str | None = None
) -> tuple[Job, list[JobResult], str]:
    """A page of answers in the order of the requests, and the token of the next page. NotFound as `get_job`."""
    job = get_job(connection, job_id, tenant)
    first = _number(_opened(page_token), MAX_ITEM, page_token) if page_token else 0
    wanted = (REQUESTS.c.job_id == job_id) & (REQUESTS.c.item >= first)
    query = select(REQUESTS).where(wanted).order_by(REQUESTS.c.item).limit(limit)
    results, size, item = list[JobResult](), 0, first
    for row in connection.execute(query).mappings():
        result = _result(connection, row)
        size += result.ByteSize()
        if results and size > RESULT_BYTES:
            break
        results.append(result)
        item = row["item"] + 1
    return job, results, _closed(str(item)) if item < job.request_count and results else ""


def _result(connection: Connection, row: Mapping[Any, Any]) -> JobResult:
    """As it was recorded at the request's end; else what there is of it."""
    if row["result"]:
        return JobResult.FromString(row["result"])
    result = JobResult(request_index=row["item"], state=row["state"])
    result.request_id = GenerateRequest.FromString(row["body"]).request_id
    for output in outputs_of(connection, row["job_id"], row["item"]):
        result.text += output.text
        result.token_ids.extend(output.token_ids)
        result.logprobs.extend(output.logprobs)
    result.usage.prompt_tokens, result.usage.output_tokens = row["prompt_tokens"], len(result.token_ids)
    return result


def _closed(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


def _opened(token: str) -> str:
    try:
        text = base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        raise _bad_token(token) from None
    if not text.isprintable():
        raise _bad_token(token)
    return text


def _number(text: str, most: int, token: str) -> int:
    """A number that the database can hold, out of an opened token."""
    if not 1 <= len(text) <= len(str(most)) or not text.isdecimal() or int(text) > most:
        raise _bad_token(token)
    return int(text)


def _bad_token(token: str) -> InvalidRequest:
    return InvalidRequest(f"page_token {shown(token)} is not one; allowed: next_page_token of the page before, or none")
