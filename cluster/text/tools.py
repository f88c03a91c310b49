"""The functions that a request offers to the model: checked, and in the form that chat templates know."""

import json
import re
from collections.abc import Sequence
from typing import Any

from ...proto.errors import InvalidRequest, shown
from ...proto.generation_pb2 import Tool

MAX_TOOLS = 128
MAX_NESTING = 64  # of any JSON that a client sends
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object of a client; InvalidRequest, which calls it `what`, for anything else or one nested too deep."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidRequest(f"{what} is nested too deep; allowed: {MAX_NESTING} levels") from None
    except ValueError as error:
        raise InvalidRequest(f"{what} is not JSON: {str(error)[:100]}; allowed: a JSON object") from None
    if _SURROGATE.search(text):  # half of one is no character
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} is {shown(text)}; allowed: a JSON object")
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return value
    raise InvalidRequest(f"{what} is nested too deep; allowed: {MAX_NESTING} levels")


def checked_name(name: str) -> str:
    """A tool's name; InvalidRequest where it is none."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"a tool named {shown(name)}; allowed: 1 to 64 letters, digits, _ and -")
    return name


def schemas_of(tools: Sequence[Tool]) -> dict[str, dict[str, Any]]:
    """The schema of each tool's arguments by its name; InvalidRequest for too many, or what is not valid."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools)} tools; allowed: at most {MAX_TOOLS}")
    schemas: dict[str, dict[str, Any]] = {}
    for tool in tools:
        if checked_name(tool.name) in schemas:
            raise InvalidRequest(f"two tools are named {shown(tool.name)}; allowed: a name of its own for each")
        schemas[tool.name] = _schema(tool)
    return schemas


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as transformers hands them to a chat template; InvalidRequest as `schemas_of`."""
    schemas = schemas_of(tools)
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": schemas[tool.name]},
        }
        for tool in tools
    ]


def _schema(tool: Tool) -> dict[str, Any]:
    if not tool.parameters:
        return {"type": "object", "properties": {}}
    schema = parse_object(tool.parameters, f"the parameters of tool {tool.name}")
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"the parameters of tool {tool.name} have another type; allowed: a schema of an object")
    return schema


def _parts(item: Any) -> list[Any]:
    inner = item.values() if isinstance(item, dict) else item
    return [value for value in inner if isinstance(value, dict | list)]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
