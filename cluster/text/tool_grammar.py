"""The grammar of an output that is a call of a tool, in the syntax that the model's chat template writes calls in."""

import json
from collections.abc import Sequence
from typing import Any

from ...model.text.answers.call_syntax import CallSyntax, Piece
from ...proto.common_pb2 import Grammar
from ...proto.errors import InvalidRequest, shown
from ...proto.generation_pb2 import Tool
from .answer_parser import ToolChoice
from .tools import schemas_of

MAX_CALLS = 16  # at once, where a call is required
# As templates write JSON: a conversation that goes on finds its pages again.
_AS_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_COMPOSED = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "patternProperties"}


def tool_grammar(tools: Sequence[Tool], choice: ToolChoice, syntax: CallSyntax, *, parallel: bool) -> Grammar | None:
    """What the output must be where a call is required, else None; InvalidRequest for tools that are not valid, a
    choice that is none of them, or none at all."""
    schemas = schemas_of(tools)
    if choice.mode != "required":
        return None
    if choice.name and choice.name not in schemas:
        allowed = ", ".join(schemas) or "no tool, for the request has none"
        raise InvalidRequest(f"tool_choice names {shown(choice.name)}; allowed: {allowed}")
    if not schemas:
        raise InvalidRequest("tool_choice requires a call, and the request has no tools; allowed: with tools")
    names = [choice.name] if choice.name else list(schemas)
    more = f" (separator call){{0,{MAX_CALLS - 1}}}" if parallel and not choice.name and syntax.separator else ""
    rules = [
        f"start: {_sequence(syntax.opening)} call{more} {_sequence(syntax.closing)}",
        f"call: {' | '.join(f'call_{index}' for index in range(len(names)))}",
    ]
    if more:
        rules.append(f"separator: {_sequence(syntax.separator or ())}")
    for index, name in enumerate(names):
        head = _sequence((*syntax.before, name, *syntax.between))
        rules.append(f"call_{index}: {head} arguments_{index} {_sequence(syntax.after)}")
        rules.append(f"arguments_{index}: %json {json.dumps(_schema(schemas[name]))}")
    return Grammar(lark="\n".join(rules))


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of what is written: arguments that it does not name are none, where that can be told by its names."""
    if _COMPOSED.isdisjoint(schema):
        schema = {"additionalProperties": False, **schema}
    return {**schema, "type": "object", "x-guidance": _AS_WRITTEN}


def _sequence(pieces: Sequence[Piece]) -> str:
    """Text, and tokens by their ids, as llguidance's Lark has them."""
    text: list[str] = []
    for piece in _joined(pieces):
        text.append(f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece))
    return " ".join(text)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbouring texts as one, which has more ways to be tokenized."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined
