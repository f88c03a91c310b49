"""What may be submitted: a submission of the wire, checked and completed; nothing else goes further in."""

import asyncio
import hashlib
import secrets
import time

from ....proto.common_pb2 import PRIORITY_STANDARD, PRIORITY_UNSPECIFIED, Priority
from ....proto.errors import InvalidRequest, IsthmusError
from ....proto.generation_pb2 import GenerateRequest
from ....proto.jobs_pb2 import SubmitJobRequest
from ....proto.names import check_name
from ...access.access import Access
from ...access.settings import NO_LIMITS, Limits
from ...requests.request import smaller, validate
from ...text.served import ServedModel
from ..labels import check_labels
from ..settings import JobsSettings
from ..store.submit import NewJob, NewRequest
from .listing import time_us

MAX_REQUESTS = 10_000
MAX_RETENTION_S = 365 * 86400
MAX_DEADLINE_S = 365 * 86400  # from now on


def claim_job(submission: SubmitJobRequest, access: Access) -> None:
    """Fills in the tenant and priority that the caller's jobs have. PermissionDenied where it asks for others.

    A request of a job has the job's tenant and priority; one that names another tenant is refused all the same.
    """
    submission.tenant, submission.priority = access.claimed(submission.tenant, submission.priority)
    for request in submission.requests:
        access.claimed(request.tenant, PRIORITY_UNSPECIFIED)


async def checked(
    submission: SubmitJobRequest, model: ServedModel, codec: str, settings: JobsSettings, limits: Limits = NO_LIMITS
) -> NewJob:
    """A submission as it can be kept: every request has a seed and, where `codec` is not empty, a codec.

    InvalidRequest or NotFound with what was wrong and what is allowed, by the caller's own `limits` too.
    """
    if not 1 <= len(submission.requests) <= MAX_REQUESTS:
        raise InvalidRequest(f"a job of {len(submission.requests)} requests; allowed: 1 to {MAX_REQUESTS}")
    check_name("idempotency_key", submission.idempotency_key)
    check_name("tenant", submission.tenant)
    labels = check_labels(submission.labels)
    if submission.priority not in Priority.values():
        raise InvalidRequest(f"priority is {submission.priority}; allowed: {', '.join(Priority.keys())}")
    deadline_us = _deadline_us(submission)
    retention_us = _retention_us(submission, settings)
    requests = [
        await _request(request, number, len(submission.requests), model, codec, limits)
        for number, request in enumerate(submission.requests)
    ]
    return NewJob(
        tenant=submission.tenant,
        priority=submission.priority or PRIORITY_STANDARD,
        idempotency_key=submission.idempotency_key,
        body_hash=_body_hash(submission),
        fingerprint=model.fingerprint,
        labels=labels,
        deadline_us=deadline_us,
        retention_us=retention_us,
        requests=requests,
    )


async def _request(
    request: GenerateRequest, number: int, count: int, model: ServedModel, codec: str, limits: Limits
) -> NewRequest:
    await asyncio.sleep(0)  # thousands of requests with token ids would be checked in one go
    try:
        _check_told_once(request)
        validated = await validate(request, model)
        most = smaller(limits.max_request_tokens, limits.tokens_per_min)
        tokens = len(validated.prompt_token_ids) + validated.sampling.max_tokens
        if most is not None and tokens > most:
            raise InvalidRequest(f"prompt and output come to {tokens} tokens; allowed for you: {most}")
    except IsthmusError as error:
        raise type(error)(f"request {number}: {error}" if count > 1 else str(error)) from None
    kept = GenerateRequest()
    kept.CopyFrom(request)
    kept.codec = request.codec or codec
    if not request.sampling.HasField("seed"):
        kept.sampling.seed = secrets.randbits(63)
    return NewRequest(
        body=kept.SerializeToString(),
        prompt_tokens=len(validated.prompt_token_ids),
        max_tokens=validated.sampling.max_tokens,
    )


def _check_told_once(request: GenerateRequest) -> None:
    """InvalidRequest where a request asks for what is not recorded."""
    if request.sampling.HasField("n") and request.sampling.n != 1:
        raise InvalidRequest(f"n is {request.sampling.n}; allowed in a job: 1, and as many requests as answers")
    for name, asked in (
        ("prompt_logprobs", request.sampling.HasField("prompt_logprobs")),
        ("return_prompt_token_ids", request.return_prompt_token_ids),
    ):
        if asked:
            raise InvalidRequest(f"{name} is set; allowed: not in a job, whose results have no place for it")


def _body_hash(submission: SubmitJobRequest) -> bytes:
    """Of all but the key. A relative deadline would differ between two tries; ours is a time, and stays the same."""
    body = SubmitJobRequest()
    body.CopyFrom(submission)
    body.ClearField("idempotency_key")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def _deadline_us(submission: SubmitJobRequest) -> int | None:
    if not submission.HasField("deadline"):
        return None
    deadline_us = time_us("deadline", submission.deadline)
    left_s = deadline_us / 1e6 - time.time()
    if left_s <= 0:
        raise InvalidRequest("the deadline has passed already; allowed: a time to come")
    if left_s > MAX_DEADLINE_S:
        raise InvalidRequest(f"the deadline is {left_s:.0f} s from now; allowed: at most {MAX_DEADLINE_S} s")
    return deadline_us


def _retention_us(submission: SubmitJobRequest, settings: JobsSettings) -> int:
    if not submission.HasField("retention"):
        return round(settings.retention_s * 1e6)
    seconds, nanos = submission.retention.seconds, submission.retention.nanos
    if not 0 <= nanos < 1_000_000_000 or not 0 < seconds + nanos / 1e9 <= MAX_RETENTION_S:
        raise InvalidRequest(
            f"retention of {seconds} s and {nanos} ns; allowed: more than 0, at most {MAX_RETENTION_S} s, and 0 to "
            "999999999 ns"
        )
    return seconds * 1_000_000 + nanos // 1000
