"""The arguments of a call while they are written: JSON that is passed on as it stands in the output."""

import json
import re
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing.response_templates import ResponseTemplateField

_MAX_HEAD = 1024  # characters before the arguments
_SIGNS = re.compile(r'\\.|["{}\[\]\n]', re.DOTALL)
_PLACE = re.compile(r"\{content\.(\w+)\}")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class JsonText:
    """Follows a JSON text that comes in pieces: whether a place is inside a string, and where the value ends."""

    def __init__(self) -> None:
        self.in_string, self.ended = False, False
        self._depth = 0
        self._escaped = False  # the next character stands for itself

    def push(self, text: str) -> str:
        """What of `text` belongs to the value."""
        if self.ended or not text:
            return ""
        place = 1 if self._escaped else 0
        for found in _SIGNS.finditer(text, place):
            place, sign = found.end(), found[0]
            if sign == '"':
                self.in_string = not self.in_string
            elif sign == "\n":  # no string has one: what should have ended here did not
                self.in_string = False
            elif not self.in_string and len(sign) == 1:
                self._depth += 1 if sign in "{[" else -1
                if self._depth <= 0:
                    self.ended = True
                    return text[:place]
        self._escaped = text.endswith("\\") and place < len(text)
        return text


@dataclass(frozen=True, kw_only=True)
class HeadKeys:
    """What an object is called by that is a call; empty where the object is the arguments."""

    name: str = ""
    arguments: str = ""


def head_keys(field: ResponseTemplateField) -> HeadKeys | None:
    """How the calls of a field begin, where their arguments are the JSON that an API tells; else None."""
    transform = field.transform.get("function") if isinstance(field.transform, dict) else None
    if field.content != "json" or field.content_args or field.transform_each:
        return None
    if transform == "{content}":
        return HeadKeys(name="name", arguments="arguments")
    if not isinstance(transform, dict):
        return None
    name, arguments = str(transform.get("name")), str(transform.get("arguments"))
    if (name, arguments) == ("{name}", "{content}"):
        return HeadKeys()
    keys = [found[1] for text in (name, arguments) if (found := _PLACE.fullmatch(text))]
    return HeadKeys(name=keys[0], arguments=keys[1]) if len(keys) == 2 else None


class ArgumentsStream:
    """One call: finds where its arguments begin, and passes them on."""

    def __init__(self, keys: HeadKeys, name: str) -> None:
        """`name`: where it stands ahead of the JSON."""
        self.name = ""  # once the call has begun
        self._ahead = name
        self._head = re.compile(_head_pattern(keys), re.DOTALL)
        self._text: str | None = ""  # while the arguments have not begun; None: they will not
        self._json: JsonText | None = None

    def push(self, text: str) -> str:
        """The arguments that are in `text`; `name` is set by the time that there are any."""
        if self._text is not None:
            self._text += text
            if (found := self._head.match(self._text)) and found.end() <= _MAX_HEAD:
                name = self._ahead or json.loads(found["name"])
                text = self._text[found.end() :]
                if NAME.fullmatch(name):
                    self.name, self._json = name, JsonText()
                self._text = None
            elif len(self._text) > _MAX_HEAD:
                self._text = None
        if self._json is None:
            return ""
        return self._json.push(text)


def _head_pattern(keys: HeadKeys) -> str:
    if not keys.name:
        return r"\s*(?=\{)"
    string = r'"(?:[A-Za-z0-9_-])*"'
    return (
        rf'\s*\{{\s*"{re.escape(keys.name)}"\s*:\s*(?P<name>{string})\s*,\s*"{re.escape(keys.arguments)}"\s*:\s*(?=\{{)'
    )


def calls_of(value: Any) -> list[tuple[str, str]]:
    """Names and arguments, as JSON, of what a parser made of calls; ValueError where it is none."""
    items = value if isinstance(value, list) else [value]
    return [_call(item) for item in items]


def _call(item: Any) -> tuple[str, str]:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict):
        raise ValueError("not a call")
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict | None):
        raise ValueError("not a call")
    text = json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        text = json.dumps(arguments)
    return name, text
