"""A response template, ready for parsers: compiled once, each search in a bounded time.

Response templates come with models, as chat templates do. A pattern of one may take exponential time on a text.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import regex
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    ResponseTemplateField,
    load_response_template,
)

from ....proto.errors import InvalidRequest
from .arguments import head_keys
from .call_syntax import CallSyntax
from .forms import AFTER_CALLS

SEARCH_S = 0.25  # of one search for a delimiter
_MAX_PATTERN = 1000  # characters
_MAX_FIELDS = 16
TOOL_CALLS = "tool_calls"
REASONING = ("reasoning_content", "reasoning", "thinking")  # names that templates have for it


class BoundedPattern:
    """What transformers' parser needs of a pattern; TimeoutError where a search takes too long."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern

    def search(self, text: str, start: int = 0, partial: bool = False) -> Any:
        """As of `regex`."""
        return self._pattern.search(text, start, partial=partial, timeout=SEARCH_S)

    def finditer(self, text: str) -> Iterator[Any]:
        """As of `regex`."""
        return self._pattern.finditer(text, timeout=SEARCH_S)


class AnswerForm:
    """How one model's answers are written."""

    def __init__(self, spec: Mapping[str, Any], special: Mapping[str, int]) -> None:
        """`special`: ids of the tokens that have no text of their own in an output. InvalidRequest where `spec` is no
        response template."""
        _check(spec)
        try:
            loaded = load_response_template(dict(spec))
        except (ValueError, TypeError, AttributeError, RecursionError, regex.error) as error:
            raise InvalidRequest(f"the model's response template is not valid: {str(error)[:200]}") from None
        fields = {name: _bounded(field, name == loaded.implicit) for name, field in loaded.fields.items()}
        self._with_tools = replace(loaded, fields=fields, start_anchor_re=BoundedPattern(loaded.start_anchor_re))
        kept = {name: field for name, field in fields.items() if name not in (TOOL_CALLS, AFTER_CALLS)}
        self._without_tools = replace(self._with_tools, fields=kept)
        said = "\0".join(_texts({name: field for name, field in spec["fields"].items() if name != loaded.implicit}))
        said += "\0" + said.replace("\\", "")  # as patterns spell it
        self.markers = {token: text for text, token in special.items() if text in said}
        self.syntax: CallSyntax | None = None  # that its parser reads, where one is known
        self._special = special

    def template(self, tools: bool) -> ResponseTemplate:
        """For answers that may have calls of tools, and for those that may not: what looks like one is text there."""
        return self._with_tools if tools else self._without_tools

    @property
    def tools(self) -> bool:
        """Whether it knows calls of tools."""
        return TOOL_CALLS in self._with_tools.fields

    @property
    def wants_schemas(self) -> bool:
        """Whether arguments are no JSON that is passed on as it is: their types are those of the tool's schema."""
        return self.tools and head_keys(self._with_tools.fields[TOOL_CALLS]) is None

    def prefix(self, prompt: str) -> str | None:
        """Of a prompt what stands after the beginning of the assistant's turn; None where that is not in it."""
        template = self._with_tools
        try:
            if next(template.start_anchor_re.finditer(prompt), None) is None:
                return None
            return template.truncate_past_last_anchor(prompt)
        except TimeoutError:
            return None

    def pieces(self, text: str) -> list[str | int]:
        """A text of a call's syntax as texts and ids of special tokens."""
        return [self._special.get(piece, piece) for piece in self._split.split(text) if piece]

    @functools.cached_property
    def _split(self) -> Any:
        longest_first = sorted(self._special, key=len, reverse=True)
        return regex.compile(f"({'|'.join(map(regex.escape, longest_first)) or '(?!)'})")


def _bounded(field: ResponseTemplateField, implicit: bool) -> ResponseTemplateField:
    """The implicit field is what is nothing else: it has no end, and its text is all kept."""
    return replace(
        field,
        open_re=field.open_re and BoundedPattern(field.open_re),
        close_re=BoundedPattern(field.close_re) if field.close_re and not implicit else None,
    )


def _check(spec: Any) -> None:
    fields = spec.get("fields") if isinstance(spec, Mapping) else None
    if not isinstance(fields, Mapping) or len(fields) > _MAX_FIELDS:
        raise InvalidRequest(f"the model's response template has no fields; allowed: 1 to {_MAX_FIELDS}")
    if any(len(text) > _MAX_PATTERN for text in _texts(spec)):
        raise InvalidRequest(f"a text of the model's response template is long; allowed: {_MAX_PATTERN} characters")


def _texts(value: Any) -> Iterator[str]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
