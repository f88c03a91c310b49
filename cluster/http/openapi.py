"""The OpenAPI document of the HTTP door, made from the models that requests are checked with."""

import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .door import Endpoint

_REF = "#/components/schemas/{model}"
# Of every endpoint but those that are open to everybody, and of every one with a body besides.
_ALWAYS = (400, 401, 403, 500)
_OF_BODIES = (413, 429, 503, 504)
_MEANING = {
    200: "The answer.",
    400: "The request cannot be as it is; `param` names the field.",
    401: "No API key or token, or none that is valid.",
    403: "The caller may not do this.",
    404: "No such model, or no such thing.",
    413: "The body is too large.",
    429: "Too much at once, or a limit of the caller's own; `Retry-After` says when to try again.",
    500: "A bug; the server's log has its trace.",
    503: "Nothing here can serve it now.",
    504: "The deadline passed.",
}


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """An OpenAPI 3.1 document of those of these endpoints that are part of the API."""
    endpoints = [each for each in endpoints if each.documented]
    sent = {each.request for each in endpoints if each.request is not None}
    told = {kind for each in endpoints for kind in (each.response, each.chunk, each.dialect.error) if kind is not None}
    _, schemas = models_json_schema(
        [
            *((model, "validation") for model in sorted(sent, key=_name)),
            *((model, "serialization") for model in sorted(told, key=_name)),
        ],
        ref_template=_REF,
    )
    paths: dict[str, dict[str, Any]] = {}
    for each in endpoints:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", each.path)
        paths.setdefault(path, {})[each.method.lower()] = _operation(each, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "isthmus", "version": version("isthmus")},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _name(model: type[BaseModel]) -> str:
    return model.__name__


def _operation(endpoint: Endpoint, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{re.sub(r'[^a-z0-9]+', '_', path.lower())}".rstrip("_"),
        "responses": _responses(endpoint),
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    if parameters:
        found["parameters"] = parameters
    if not endpoint.open:
        found["security"] = [{"key": []}, {}]
    if endpoint.request is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(endpoint.request)}}}
    return found


# One event of a stream. Its data is JSON, described by `x-event`; but for the end of OpenAI's streams, `[DONE]`.
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {
        "application/json": {"schema": _ref(endpoint.response) if endpoint.response is not None else {}}
    }
    if endpoint.chunk is not None:
        content["text/event-stream"] = {"schema": _EVENT, "x-event": _ref(endpoint.chunk)}
    statuses = set(endpoint.errors)
    if not endpoint.open:
        statuses |= {*_ALWAYS, *(_OF_BODIES if endpoint.request is not None else ())}
    error = {"application/json": {"schema": _ref(endpoint.dialect.error)}}
    errors = {str(status): {"description": _MEANING[status], "content": error} for status in sorted(statuses)}
    return {"200": {"description": _MEANING[200], "content": content}, **errors}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
