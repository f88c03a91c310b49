"""Errors with their status and headers, and the form that a family of the API tells them in (`Dialect`): OpenAI's,
`{"error": {"message", "type", "param", "code"}}`, where a family has none of its own.

400 InvalidRequest, OutOfRange      403 PermissionDenied    409 AlreadyExists, IllegalState    503 Unavailable
401 Unauthenticated                 404 NotFound            429 Exhausted                      504 Expired
413 a body that is too large        499 in logs alone: the client is gone                      500 a bug, Corrupt
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...proto.errors import (
    AlreadyExists,
    Blamed,
    Corrupt,
    Exhausted,
    Expired,
    IllegalState,
    Incompatible,
    InvalidRequest,
    IsthmusError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from ...proto.rpc.statuses import status_of_bug
from ..access.usage import Allowance

log = logging.getLogger(__name__)

CLIENT_GONE = 499  # in logs; there is nobody to tell
ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]

# The first that an error is: subclasses go before their bases.
_KINDS: tuple[tuple[type[Exception], int, ErrorType, str], ...] = (
    (InvalidRequest, 400, "invalid_request_error", "invalid_value"),
    (OutOfRange, 400, "invalid_request_error", "out_of_range"),
    (Unauthenticated, 401, "authentication_error", "invalid_api_key"),
    (PermissionDenied, 403, "permission_error", "permission_denied"),
    (NotFound, 404, "invalid_request_error", "not_found"),
    (AlreadyExists, 409, "invalid_request_error", "already_exists"),
    (IllegalState, 409, "invalid_request_error", "illegal_state"),
    (Exhausted, 429, "rate_limit_error", "rate_limit_exceeded"),
    (Incompatible, 503, "server_error", "incompatible"),
    (Unavailable, 503, "server_error", "unavailable"),
    (Expired, 504, "server_error", "deadline_exceeded"),
    (Blamed, 500, "server_error", "blamed"),
    (Corrupt, 500, "server_error", "corrupt"),
)
_LEAST_RETRY_S = 0.1


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer of a status of 400 or more has."""

    error: ErrorDetail


class ClientGone(BaseException):
    """Whoever asked has closed the connection, or does not read: nothing is to be told, so no handler catches this."""


class BadField(InvalidRequest):
    """A field of the request that cannot be as it is."""

    def __init__(self, text: str, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(text)
        self.param, self.code = param, code


class UnknownModel(NotFound):
    """The model that the request names is not here."""

    param, code = "model", "model_not_found"


class BodyTooLarge(InvalidRequest):
    """More bytes than a request may have."""

    param, code = None, "body_too_large"


class Problem(NamedTuple):
    """An error that is to be told."""

    status: int
    type: ErrorType
    message: str
    param: str | None
    code: str


def problem_of(error: Exception) -> Problem:
    """What an error is; a bug is logged here, under an incident that the text names."""
    for kind, status, type_, code in _KINDS:
        if isinstance(error, kind):
            status = 413 if isinstance(error, BodyTooLarge) else status
            param = getattr(error, "param", None)
            return Problem(status, type_, str(error), param, getattr(error, "code", None) or code)
    return Problem(500, "server_error", status_of_bug(error, "a request over HTTP").details, None, "internal_error")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a family of the API tells what all of them have to tell."""

    error: type[BaseModel]  # for the document
    error_body: Callable[[Problem], dict[str, Any]]
    allowance: Callable[[Mapping[str, Allowance]], dict[str, str]]  # headers: what is left of a caller's limits
    request_id: str = "x-request-id"  # a header that the id of the request is in too


def _body(problem: Problem) -> dict[str, Any]:
    found = {"message": problem.message, "type": problem.type, "param": problem.param, "code": problem.code}
    return {"error": found}


def _allowance(left: Mapping[str, Allowance]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, each in left.items():
        found[f"x-ratelimit-limit-{name}"] = str(each.limit)
        found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(each.remaining)))
        found[f"x-ratelimit-reset-{name}"] = f"{each.reset_s:.3f}s"
    return found


OPENAI = Dialect(error=ErrorBody, error_body=_body, allowance=_allowance)


def headers_of(error: Exception) -> dict[str, str]:
    """When to try again, where that may help; how to show a key, where none was shown."""
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": "Bearer"}
    wait_s = error.retry_after_s if isinstance(error, IsthmusError) else None
    if wait_s is None:
        return {}
    wait_s = max(_LEAST_RETRY_S, wait_s)
    return {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(round(wait_s * 1000))}


def response_of(error: Exception, dialect: Dialect, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that tells an error."""
    if isinstance(error, IsthmusError) and error.private:
        log.warning("refused a request", extra={"fields": {"why": str(error), "private": error.private}})
    problem = problem_of(error)
    return JSONResponse(dialect.error_body(problem), problem.status, {**(headers or {}), **headers_of(error)})


async def on_error(request: Request, error: Exception) -> Response:
    """The answer for what a handler raised."""
    allowance = getattr(request.state, "allowance", dict)
    if isinstance(error, InvalidRequest) and not hasattr(error, "param"):
        error = BadField(str(error), _param_of(error, getattr(request.state, "fields", {})))
    return response_of(error, request.state.dialect, allowance())


def _param_of(error: Exception, fields: Mapping[str, str]) -> str | None:
    """The field that an error from below the door is about, by its first word."""
    word = str(error).removeprefix("the ").removeprefix("a ").partition(" ")[0].partition(".")[0]
    return fields.get(word)


async def on_routing(request: Request, error: Exception) -> Response:
    """The answer where no handler was found."""
    assert isinstance(error, HTTPException)
    what, status = f"{request.method} {request.url.path}", error.status_code
    if status == 404:
        text, code = f"no {what} here; /openapi.json has all that is", "unknown_url"
    else:
        allowed = (error.headers or {}).get("Allow", "none")
        text, code = f"{what} is not allowed; allowed: {allowed}", "method_not_allowed"
    problem = Problem(status, "invalid_request_error", text, None, code)
    return JSONResponse(request.state.dialect.error_body(problem), status, error.headers)
