"""What may be submitted: a submission of the wire, checked and completed; nothing else goes further in."""

import hashlib
import secrets
import time

from ...proto.common_pb2 import PRIORITY_STANDARD, Priority
from ...proto.errors import InvalidRequest, IsthmusError
from ...proto.generation_pb2 import GenerateRequest
from ...proto.jobs_pb2 import SubmitJobRequest
from ..request import examine
from ..served import ServedModel
from .settings import JobsSettings
from .submit import NewJob, NewRequest

MAX_REQUESTS = 10_000
MAX_NAME = 128
MAX_LABELS, MAX_LABEL_KEY, MAX_LABEL_VALUE = 32, 63, 255
MAX_RETENTION_S = 365 * 86400


async def checked(submission: SubmitJobRequest, model: ServedModel, codec: str, settings: JobsSettings) -> NewJob:
    """A submission as it can be kept: every request has a seed and, where `codec` is not empty, a codec.

    InvalidRequest or NotFound with what was wrong and what is allowed.
    """
    if not 1 <= len(submission.requests) <= MAX_REQUESTS:
        raise InvalidRequest(f"a job of {len(submission.requests)} requests; allowed: 1 to {MAX_REQUESTS}")
    _check_name("idempotency_key", submission.idempotency_key)
    _check_name("tenant", submission.tenant)
    _check_labels(submission)
    if submission.priority not in Priority.values():
        raise InvalidRequest(f"priority is {submission.priority}; allowed: {', '.join(Priority.keys())}")
    deadline_us = _deadline_us(submission)
    retention_us = _retention_us(submission, settings)
    requests = [
        await _request(request, number, len(submission.requests), model, codec)
        for number, request in enumerate(submission.requests)
    ]
    return NewJob(
        tenant=submission.tenant,
        priority=submission.priority or PRIORITY_STANDARD,
        idempotency_key=submission.idempotency_key,
        body_hash=_body_hash(submission),
        fingerprint=model.fingerprint,
        labels=dict(submission.labels),
        deadline_us=deadline_us,
        retention_us=retention_us,
        requests=requests,
    )


async def _request(request: GenerateRequest, number: int, count: int, model: ServedModel, codec: str) -> NewRequest:
    try:
        examined = await examine(request, model)
    except IsthmusError as error:
        raise type(error)(f"request {number}: {error}" if count > 1 else str(error)) from None
    kept = GenerateRequest()
    kept.CopyFrom(request)
    kept.codec = request.codec or codec
    if not request.sampling.HasField("seed"):
        kept.sampling.seed = secrets.randbits(63)
    return NewRequest(
        body=kept.SerializeToString(),
        prompt_tokens=len(examined.prompt_token_ids),
        max_tokens=examined.sampling.max_tokens,
    )


def _body_hash(submission: SubmitJobRequest) -> bytes:
    """Of all but the key. A relative deadline would differ between two tries; ours is a time, and stays the same."""
    body = SubmitJobRequest()
    body.CopyFrom(submission)
    body.ClearField("idempotency_key")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def _check_name(what: str, name: str) -> None:
    if len(name) > MAX_NAME or not name.isprintable():
        raise InvalidRequest(f"{what} {name[:MAX_NAME]!r}; allowed: at most {MAX_NAME} printable characters")


def _check_labels(submission: SubmitJobRequest) -> None:
    if len(submission.labels) > MAX_LABELS:
        raise InvalidRequest(f"{len(submission.labels)} labels; allowed: at most {MAX_LABELS}")
    for key, value in submission.labels.items():
        if not 1 <= len(key) <= MAX_LABEL_KEY or len(value) > MAX_LABEL_VALUE or not (key + value).isprintable():
            raise InvalidRequest(
                f"label {key[:MAX_LABEL_KEY]!r}; allowed: keys of 1 to {MAX_LABEL_KEY} printable characters, "
                f"values of at most {MAX_LABEL_VALUE}"
            )


def _deadline_us(submission: SubmitJobRequest) -> int | None:
    if not submission.HasField("deadline"):
        return None
    deadline_us = submission.deadline.ToMicroseconds()
    if deadline_us <= time.time() * 1e6:
        raise InvalidRequest("the deadline has passed already; allowed: a time to come")
    return deadline_us


def _retention_us(submission: SubmitJobRequest, settings: JobsSettings) -> int:
    if not submission.HasField("retention"):
        return round(settings.retention_s * 1e6)
    seconds = submission.retention.ToMicroseconds() / 1e6
    if not 0 < seconds <= MAX_RETENTION_S:
        raise InvalidRequest(f"retention of {seconds:g} s; allowed: more than 0, at most {MAX_RETENTION_S} s")
    return submission.retention.ToMicroseconds()
