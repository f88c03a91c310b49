"""The body of a request: read within bounds of bytes and time, and checked against its model."""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from ...proto.errors import Expired, InvalidRequest, shown
from ...proto.rpc.limits import REQUEST_S
from .errors import BadField, BodyTooLarge, ClientGone

M = TypeVar("M", bound=BaseModel)

_MOST_ERRORS = 1000
_MOST_BRACKETS = 100_000
_SHOWN_BODY = 64 << 10  # bytes
_TYPES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})  # as pydantic names members of unions


class Body(BaseModel):
    """A JSON object that a client sends. What is not known is an error, and what is close to a value is not taken for
    it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """All of a request's body. BodyTooLarge for more than `most` bytes, Expired where it does not come within
    REQUEST_S, ClientGone where its client goes away."""
    headers = Headers(scope=scope)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("content-encoding is set; allowed: bodies that are not compressed")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(REQUEST_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > most:
                    raise _too_large(most)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Expired(f"the request did not arrive within {REQUEST_S:g} s") from None


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"a body of more than {most} bytes; allowed: {most} (gateway: {{http: {{max_body_bytes: ...}}}})"
    )


def parse_body(model: type[M], scope: Scope, body: bytes, *, strict_fields: bool) -> M:
    """What a client sent, checked. BadField names the first field that is wrong."""
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # any other a page of any site may send without asking
        raise InvalidRequest(f"content-type is {shown(kind)}; allowed: application/json")
    if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:  # each takes a hundred times its size once it is read
        raise InvalidRequest(f"more than {_MOST_BRACKETS} lists and objects in the body; allowed: fewer")
    try:
        return model.model_validate_json(body, extra=None if strict_fields else "ignore")
    except ValidationError as error:
        raise bad_field(error, show=len(body) < _SHOWN_BODY) from None


def bad_field(error: ValidationError, *, show: bool) -> BadField:
    """The first thing that is wrong with a body, of those that stand deepest: of a union each member complains.

    `show`: whether its value may be shown. Those of a large body are large too, and made anew to be shown.
    """
    if error.error_count() > _MOST_ERRORS:  # to list them would take a while
        return BadField(f"{error.error_count()} mistakes in the body", None)
    errors = error.errors(include_url=False, include_context=True, include_input=show)
    first = max(errors, key=lambda each: (len(_path(each)), -errors.index(each)))
    param = ".".join(map(str, _path(first)))
    text, code = _explain(first, param)
    return BadField(text, param or None, code)


def _explain(error: ErrorDetails, param: str) -> tuple[str, str]:
    kind, message = error["type"], error["msg"]
    if kind == "json_invalid":
        return f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}", "invalid_json"
    if kind == "extra_forbidden":
        return f"{param} is not a field that is known here", "unknown_field"
    if kind == "missing":
        return f"{param} is missing", "missing_field"
    if kind == "none_required":
        return f"{param} is not supported here; allowed: null, or none", "unsupported"
    if kind == "literal_error":
        expected = error.get("ctx", {})["expected"].replace("True", "true").replace("False", "false")
        given = f" is {_given(error['input'])}" if "input" in error else ""
        return f"{param}{given}; allowed: {expected}", "invalid_value"
    message = message.removeprefix("Value error, ")
    if kind == "value_error":
        return (f"{param}: {message}" if param else message), "invalid_value"
    given = error.get("input", ...)
    is_short = isinstance(given, str | int | float | bool | None)
    what = f"{param} is {_given(given)}" if is_short else (param or "the body")
    return f"{what}: {message[:1].lower()}{message[1:]}", "invalid_type" if kind.endswith("_type") else "invalid_value"


def _given(value: Any) -> str:
    if isinstance(value, str):
        return shown(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shown(str(value)).strip("'") if isinstance(value, int | float) else f"a {type(value).__name__}"


def _path(error: ErrorDetails) -> list[int | str]:
    """Where it is, as the body has it: what pydantic adds of its own (the members of unions) left out."""
    *path, last = error["loc"] or ("",)
    own = error["type"] in ("extra_forbidden", "missing")  # the last one is a field for sure, whatever its name
    found = [part for part in (*path, *(() if own else (last,))) if not _is_member(part)]
    return [part for part in (*found, *((last,) if own else ())) if part != ""]


def _is_member(part: int | str) -> bool:
    if isinstance(part, int):
        return False
    return part in _TYPES or part[:1].isupper() or any(mark in part for mark in "[]()-")
