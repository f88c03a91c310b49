"""Grammars in the one language that is compiled: llguidance's variant of Lark.

JSON schemas and regular expressions stand in it as they are; llguidance compiles them. Nothing of a schema is left out:
a keyword that is not supported is an error that names it.
"""

import json
import re

from ...proto.errors import InvalidRequest
from ...proto.grammar import Grammar

# At each place where JSON allows whitespace: enough to indent deeply, and an output cannot consist of it.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_JSON_OPTIONS = {
    "whitespace_pattern": _WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
# llguidance would have forced text tokenized anew, by a tokenizer that may read control tokens into it: every token
# that is a beginning of what must come is allowed instead. The last such line counts.
_END = '\n%llguidance {"no_forcing": true}\n'
_MAX_REASON = 300
MAX_INTEGER = 1 << 53  # in a schema; what an answer has may be larger


def lark_of(grammar: Grammar) -> str:
    """The grammar as Lark; InvalidRequest where it is not even JSON, or says how llguidance shall compile it."""
    if grammar.kind == "json_object":
        return _json({"type": "object"})
    if grammar.kind == "json_schema":
        return _json(_schema(grammar.text))
    if grammar.kind == "regex":
        from llguidance import regex_to_lark

        return f"start: /{regex_to_lark(grammar.text, '')}/{_END}"
    if grammar.kind == "choices":
        # JSON escapes all that a string of Lark needs escaped; what is left are quotes around text.
        return f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in grammar.choices)}{_END}"
    if grammar.text.lstrip().startswith("{"):
        raise InvalidRequest("grammar.lark is a JSON object; allowed: rules, of which one is `start`")
    return grammar.text + _END


def refused(grammar: Grammar, reason: str) -> InvalidRequest:
    """The error for what llguidance says of a grammar, which may be many lines: its source, and marks below it."""
    text = re.split(r"\n\s+\d+ \| |\n<non-verbose/>", reason)[0]
    lines = [line.strip() for line in text.splitlines()]
    text = " ".join(line for line in lines if line.strip("^ "))
    if grammar.kind != "lark":
        text = re.sub(r"^at \d+\(\d+\): ", "", text).removeprefix("failed to compile JSON schema: ")
    if len(text) > _MAX_REASON:
        text = text[:_MAX_REASON] + "..."
    return InvalidRequest(f"grammar.{grammar.kind} cannot be compiled: {text}")


def _json(schema: dict[str, object]) -> str:
    return f"start: %json {json.dumps(schema | {'x-guidance': _JSON_OPTIONS})}{_END}"


def _schema(text: str) -> dict[str, object]:
    try:
        schema = json.loads(text, parse_constant=_no_number, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"grammar.json_schema cannot be read: {reason}") from None
    if not isinstance(schema, dict):
        raise InvalidRequest("grammar.json_schema is no JSON object; allowed: a schema, {} for any JSON")
    if "x-guidance" in schema:
        raise InvalidRequest("x-guidance in grammar.json_schema; allowed: keywords of JSON Schema")
    return schema


def _integer(digits: str) -> int:
    """llguidance rounds larger ones, and dies of the least that has 64 bits."""
    if len(digits) > 17 or abs(number := int(digits)) > MAX_INTEGER:
        raise ValueError(f"{digits[:30]} is too large an integer; allowed: {-MAX_INTEGER} to {MAX_INTEGER}")
    return number


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
