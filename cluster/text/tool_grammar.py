"""The grammar of an output that is a call of a tool, in the syntax that the model's chat template writes calls in."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...proto.common_pb2 import Grammar
from ...proto.errors import InvalidRequest, shown
from ...proto.generation_pb2 import Tool
from .answer_parser import ToolChoice
from .tools import schemas_of

if TYPE_CHECKING:
    from ...model.text.answers.form import AnswerForm

MAX_CALLS = 16  # at once, where a call is required
# As templates write JSON: a conversation that goes on finds its pages again.
_AS_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_COMPOSED = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "patternProperties"}


def tool_grammar(
    tools: Sequence[Tool], choice: ToolChoice, form: "Callable[[], AnswerForm]", *, parallel: bool
) -> Grammar | None:
    """What the output must be where a call is required, else None; InvalidRequest for tools that are not valid, a
    choice that is none of them, or none at all. `form` has a syntax of calls, and reads them."""
    schemas = schemas_of(tools)
    if choice.mode != "required":
        return None
    if choice.name and choice.name not in schemas:
        allowed = ", ".join(schemas) or "no tool, for the request has none"
        raise InvalidRequest(f"tool_choice names {shown(choice.name)}; allowed: {allowed}")
    if not schemas:
        raise InvalidRequest("tool_choice requires a call, and the request has no tools; allowed: with tools")
    names = [choice.name] if choice.name else list(schemas)
    return Grammar(lark=_lark(names, schemas, form(), several=parallel and not choice.name))


def _lark(names: Sequence[str], schemas: Mapping[str, dict[str, Any]], form: "AnswerForm", *, several: bool) -> str:
    syntax = form.syntax
    assert syntax is not None
    pieces = form.pieces
    more = ""
    if several and syntax.separator is not None:
        more = f" ({_sequence(pieces(syntax.separator))} call){{0,{MAX_CALLS - 1}}}"
    rules = [
        f"start: {_sequence(pieces(syntax.opening))} call{more} {_sequence(pieces(syntax.closing))}",
        f"call: {' | '.join(f'call_{index}' for index in range(len(names)))}",
    ]
    for index, name in enumerate(names):
        head = _sequence([*pieces(syntax.before), name, *pieces(syntax.between)])
        rules.append(f"call_{index}: {head} arguments_{index} {_sequence(pieces(syntax.after))}")
        rules.append(f"arguments_{index}: %json {json.dumps(_schema(schemas[name]))}")
    return "\n".join(rules)


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of what is written: arguments that it does not name are none, where that can be told by its names."""
    if _COMPOSED.isdisjoint(schema):
        schema = {"additionalProperties": False, **schema}
    return {**schema, "type": "object", "x-guidance": _AS_WRITTEN}


def _sequence(pieces: Sequence[str | int]) -> str:
    """Texts, and tokens by their ids, as llguidance's Lark has them."""
    return " ".join(f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece) for piece in _joined(pieces))


def _joined(pieces: Sequence[str | int]) -> list[str | int]:
    """The same with neighbouring texts as one: it has more ways to be tokenized."""
    joined: list[str | int] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined
