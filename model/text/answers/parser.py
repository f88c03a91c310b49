"""transformers' incremental parser, made to go on where an answer is not what its response template expects."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import regex
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, ResponseTemplateField

from .arguments import JsonText, head_keys
from .form import SEARCH_S, TOOL_CALLS

MAX_JSON = 1 << 20  # characters of a call
MAX_DIALECT = 32 << 10  # of one that is no plain JSON
_TRIM_AT = 64 << 10
_KEPT = 64  # characters before the place of the parser, for patterns that look back


class TolerantParser(ResponseParser):
    """Events as of transformers, and {"type": "unparsed", "field", "text"} for a region that could not be parsed.

    Text that is in no region is content. The event that closes a call has its whole text as `raw`.
    """

    def __init__(self, template: ResponseTemplate, prefix: str, tools: Sequence[dict[str, Any]]) -> None:
        self._region_start = self._body_start = 0
        self._plain = False  # inside a call that is plain JSON
        self._string, self._string_place = JsonText(), 0
        super().__init__(template, prefix=prefix, tools=list(tools))
        field = self._spec.fields.get(TOOL_CALLS)
        if field is not None and field.close_re is not None and head_keys(field):
            outside: Any = _OutsideStrings(self, field.close_re)
            fields = {**self._spec.fields, TOOL_CALLS: replace(field, close_re=outside)}
            self._spec = replace(self._spec, fields=fields)

    @property
    def held(self) -> int:
        """Characters that may be the beginning of a delimiter."""
        return len(self._buffer) - self._pos

    @property
    def in_call(self) -> bool:
        """Inside a call of a tool."""
        return self._current == TOOL_CALLS

    def rest(self) -> str:
        """Text that was given and is in no event yet, with that of a call that is not closed."""
        return self._buffer[self._region_start if self.in_call else self._pos :]

    def advance(self, text: str, *, end: bool = False) -> tuple[list[dict[str, Any]], bool]:
        """The events of more text, and whether the parser can go on: not where a search for a delimiter took too long.

        What is done with is forgotten.
        """
        if self._pos > _TRIM_AT and not self.in_call:
            self._buffer, self._pos = self._buffer[self._pos - _KEPT :], _KEPT
        self._buffer += text
        events: list[dict[str, Any]] = []
        try:
            self._process(events, eos=end)
        except TimeoutError:
            return events, False
        return events, True

    def in_string(self, place: int) -> bool:
        """Whether a place of the buffer is inside a string of the call's JSON; places only grow."""
        if place > self._string_place:
            self._string.push(self._buffer[self._string_place : place])
            self._string_place = place
        return self._string.in_string and not self._string.ended

    def _open_explicit(self, events: list[dict[str, Any]], field: ResponseTemplateField, m: Any) -> None:
        super()._open_explicit(events, field, m)
        self._region_start, self._body_start = m.start(), m.end()
        self._string, self._string_place = JsonText(), m.end()
        events[-1] |= {"name": self._captures.get("name", ""), "opening": m[0]}

    def _accumulate(self, events: list[dict[str, Any]], text: str) -> None:
        if self._current is None:
            events.append({"type": "region_chunk", "field": "content", "text": text, "dirty": False})
        else:
            super()._accumulate(events, text)

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        field, raw = self._current, self._buffer[self._region_start : self._pos]
        called = field == TOOL_CALLS and self._opened
        try:
            if called:
                _check_body(self._body, self._spec.fields[TOOL_CALLS])
            super()._close_current(events)
        except Exception:  # whatever a model's response template does to a text
            events.append({"type": "unparsed", "field": field, "text": raw})
            self._reset_to_implicit()
        else:
            if called:
                events[-1]["raw"] = raw


class _OutsideStrings:
    """A delimiter that ends a call, where it is not inside a string of the call's JSON."""

    def __init__(self, parser: TolerantParser, pattern: Any) -> None:
        self._parser, self._pattern = parser, pattern

    def search(self, text: str, start: int, partial: bool = False) -> Any:
        while True:
            found = self._pattern.search(text, start, partial=partial)
            if found is None or found.partial or not self._parser.in_string(found.start()):
                return found
            start = max(found.end(), found.start() + 1)


def _check_body(body: str, field: ResponseTemplateField) -> None:
    """ValueError or TimeoutError for a call that would take long to parse."""
    plain = field.content == "json" and not field.content_args
    if len(body) > (most := MAX_JSON if plain else MAX_DIALECT):
        raise ValueError(f"a call of more than {most} characters")
    patterns = [field.content_args.get("tag_pattern")] if field.content == "xml-inline" else []
    for begin, end in field.content_args.get("string_delims", []):
        patterns.append(regex.escape(begin) + "(.*?)" + regex.escape(end))
    for pattern in filter(None, patterns):
        for _ in regex.compile(pattern, regex.DOTALL).finditer(body, timeout=SEARCH_S):
            pass
