"""Rows of the database as messages of the wire."""

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from ....proto.jobs_pb2 import Job, JobEvent, JobOutput

Row = Mapping[Any, Any]


def job_of(row: Row) -> Job:
    """The message of one row of `jobs`."""
    job = Job(
        job_id=row["id"],
        state=row["state"],
        tenant=row["tenant"],
        priority=row["priority"],
        labels=json.loads(row["labels"]),
        idempotency_key=row["idempotency_key"] or "",
        request_count=row["request_count"],
        succeeded_count=row["succeeded"],
        failed_count=row["failed"],
        prompt_tokens=row["prompt_tokens"],
        output_tokens=row["output_tokens"],
        last_event=row["last_event"],
        resumes=row["resumes"],
    )
    for name, column in _TIMES:
        if row[column] is not None:
            getattr(job, name).FromMicroseconds(row[column])
    if row["error_code"]:
        job.error.code, job.error.message = row["error_code"], row["error_message"]
    return job


def event_of(row: Row) -> JobEvent:
    """The message of one row of `events`."""
    if row["item"] is None:
        return state_event(row["number"], row["time_us"], row["state"])
    return JobEvent(number=row["number"], time=timestamp(row["time_us"]), output=JobOutput.FromString(row["body"]))


def state_event(number: int, time_us: int, state: int) -> JobEvent:
    """The event of a new state."""
    return JobEvent(number=number, time=timestamp(time_us), state=state)  # pyright: ignore[reportArgumentType]


def timestamp(time_us: int) -> Timestamp:
    """Microseconds since 1970 as a message."""
    return Timestamp(seconds=time_us // 1_000_000, nanos=time_us % 1_000_000 * 1000)


_TIMES = (
    ("create_time", "created_us"),
    ("start_time", "started_us"),
    ("end_time", "ended_us"),
    ("deadline", "deadline_us"),
    ("expire_time", "expire_us"),
)
