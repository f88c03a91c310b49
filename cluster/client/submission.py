"""Submissions and listings as people write them: "10m", "batch", "running"."""

import re
import time
from collections.abc import Mapping, Sequence

from ...proto.common_pb2 import Priority
from ...proto.errors import InvalidRequest
from ...proto.generation_pb2 import GenerateRequest
from ...proto.jobs_pb2 import ListJobsRequest, SubmitJobRequest
from ..jobs.states import JobState

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def new_submission(
    requests: Sequence[GenerateRequest],
    *,
    priority: str,
    labels: Mapping[str, str],
    tenant: str = "",
    key: str = "",
    deadline: str | None = None,
    retention: str | None = None,
) -> SubmitJobRequest:
    """A submission; InvalidRequest for a priority or a duration that is none."""
    submission = SubmitJobRequest(
        requests=requests, idempotency_key=key, tenant=tenant, priority=priority_of(priority), labels=labels
    )
    if deadline is not None:
        submission.deadline.FromNanoseconds(time.time_ns() + seconds_of(deadline) * 10**9)
    if retention is not None:
        submission.retention.FromSeconds(seconds_of(retention))
    return submission


def listing(*, states: Sequence[str], labels: Mapping[str, str], tenant: str, since: str | None) -> ListJobsRequest:
    """A question for jobs; InvalidRequest for a state or a duration that is none."""
    request = ListJobsRequest(tenant=tenant, states=[state_of(state).value for state in states], labels=labels)  # pyright: ignore[reportArgumentType]
    if since is not None:
        request.created_after.FromNanoseconds(time.time_ns() - seconds_of(since) * 10**9)
    return request


def seconds_of(duration: str) -> int:
    """Seconds of "90s", "10m", "2h" or "3d"."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", duration.strip())
    if found is None or int(found[1]) == 0:
        raise InvalidRequest(f"{duration!r} is not a duration; allowed: 90s, 10m, 2h, 3d")
    return int(found[1]) * SECONDS[found[2]]


def priority_of(name: str) -> Priority.ValueType:
    """The class of "interactive", "standard" or "batch"."""
    try:
        return Priority.Value(f"PRIORITY_{name.upper()}")
    except ValueError:
        raise InvalidRequest(f"no priority {name!r}; allowed: interactive, standard, batch") from None


def state_of(name: str) -> JobState:
    """The state of "queued", "running" and so on."""
    try:
        return JobState[name.upper()]
    except KeyError:
        allowed = ", ".join(state.name.lower() for state in JobState)
        raise InvalidRequest(f"no state {name!r}; allowed: {allowed}") from None
