"""Errors and limits as Anthropic's API tells them."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from ...access.usage import Allowance
from ..common.told import Told
from ..errors import Dialect, Problem

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessagesErrorDetail(Told):
    """What was wrong."""

    type: str
    message: str


class MessagesError(Told):
    """What every answer of a status of 400 or more has here."""

    type: Literal["error"]
    error: MessagesErrorDetail


def _error_body(problem: Problem) -> dict[str, Any]:
    kind = _TYPES.get(problem.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": problem.message}}


def _allowance(left: Mapping[str, Allowance]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, each in left.items():
        reset = datetime.now(UTC) + timedelta(seconds=math.ceil(each.reset_s))
        found[f"anthropic-ratelimit-{name}-limit"] = str(each.limit)
        found[f"anthropic-ratelimit-{name}-remaining"] = str(max(0, math.floor(each.remaining)))
        found[f"anthropic-ratelimit-{name}-reset"] = reset.strftime("%Y-%m-%dT%H:%M:%SZ")
    return found


ANTHROPIC = Dialect(error=MessagesError, error_body=_error_body, allowance=_allowance, request_id="request-id")
