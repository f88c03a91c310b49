"""An output as it comes, told apart: content, reasoning, calls of tools."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .arguments import ArgumentsStream, calls_of, head_keys
from .form import REASONING, TOOL_CALLS, AnswerForm
from .forms import AFTER_CALLS
from .parser import TolerantParser

_SLICE = 4096  # characters that are parsed at once
_MAX_HELD = 4096  # that wait for the rest of a delimiter


@dataclass(frozen=True)
class Part:
    """A piece of an answer. A `call` begins one, its text is the tool's name; `arguments` are of the last one begun."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str


class AnswerReader:
    """Reads one output. What cannot be parsed is content; nothing that a model writes raises an error."""

    def __init__(self, form: AnswerForm, *, prefix: str, calls: bool, tools: Sequence[dict[str, Any]] = ()) -> None:
        """`prefix`: what stands in the prompt after the beginning of the assistant's turn. `calls`: whether it may call
        tools; if not, what looks like a call is content. `tools`: as templates have them, for a form that wants their
        schemas: arguments that it has as text become what their schema says."""
        template = form.template(calls)
        self._parser: TolerantParser | None = TolerantParser(template, prefix, tools)
        self._of_prompt = self._parser.held  # characters of the prefix that the parser has not let go: no output
        field = template.fields.get(TOOL_CALLS)
        self._keys = head_keys(field) if field else None
        self._stream: ArgumentsStream | None = None
        self._streamed = False  # the call in this region was begun
        self._called = False
        self._content, self._reasoning = _Trimmed(), _Trimmed(begins=True)

    def push(self, text: str) -> Iterator[Part]:
        """What became certain."""
        for start in range(0, len(text), _SLICE):
            yield from self._advance(text[start : start + _SLICE])

    def finish(self) -> Iterator[Part]:
        """What was held back, where the output ends."""
        yield from self._advance("", end=True)
        yield from self._part("content", self._content.rest())

    def _advance(self, text: str, *, end: bool = False) -> Iterator[Part]:
        parser = self._parser
        if parser is None:
            yield from self._part("content", self._content.push(text))
            return
        events, sound = parser.advance(text, end=end)
        for event in events:
            yield from self._on(event)
        if not sound or parser.held > _MAX_HELD:  # no delimiter is so long
            self._parser = None
            rest = "" if parser.in_call and self._streamed else parser.rest()
            yield from self._part("content", self._content.push(self._own(rest)))

    def _on(self, event: dict[str, Any]) -> Iterator[Part]:
        kind, field = event["type"], event["field"]
        if kind == "region_chunk" and self._of_prompt and field != TOOL_CALLS:
            event["text"] = self._own(event["text"])
        if field == TOOL_CALLS:
            yield from self._on_call(kind, event)
        elif kind in ("region_open", "region_close") and field in REASONING:
            self._reasoning = _Trimmed(begins=True)
            self._content.interrupt()
            self._of_prompt = 0
        elif kind == "region_open" and field == AFTER_CALLS and not self._called:  # there are none that it could end
            yield from self._part("content", self._content.push(event["opening"]))
        elif kind == "region_chunk" and field in REASONING:
            yield from self._part("reasoning", self._reasoning.push(event["text"]))
        elif kind == "region_chunk":
            yield from self._part("content", self._content.push(event["text"]))

    def _on_call(self, kind: str, event: dict[str, Any]) -> Iterator[Part]:
        if kind == "region_open":
            self._stream = ArgumentsStream(self._keys, event["name"]) if self._keys else None
            self._streamed = False
        elif kind == "region_chunk" and self._stream:
            text = self._stream.push(event["text"])
            if self._stream.name and not self._streamed:
                self._streamed = True
                yield from self._begin(self._stream.name)
            yield from self._part("arguments", text)
        elif kind == "region_close" and not self._streamed:
            try:
                calls = calls_of(event["value"])
            except (ValueError, RecursionError):
                yield from self._part("content", self._content.push(self._own(event["raw"])))
                return
            self._of_prompt = 0
            for name, arguments in calls:
                yield from self._begin(name)
                yield from self._part("arguments", arguments)
        elif kind == "unparsed" and not self._streamed:
            yield from self._part("content", self._content.push(self._own(event["text"])))

    def _own(self, text: str) -> str:
        """The output's part of the next text that the parser gives."""
        dropped = min(self._of_prompt, len(text))
        self._of_prompt -= dropped
        return text[dropped:]

    def _begin(self, name: str) -> Iterator[Part]:
        self._content.interrupt()
        self._of_prompt, self._called = 0, True
        yield Part("call", name)

    @staticmethod
    def _part(kind: Literal["content", "reasoning", "arguments"], text: str) -> Iterator[Part]:
        if text:
            yield Part(kind, text)


class _Trimmed:
    """A text without the blanks beside what was told apart from it: they are of the syntax."""

    def __init__(self, begins: bool = False) -> None:
        self._begins = begins  # blanks are left out until there is something else
        self._blanks = ""  # that are left out if something else follows

    def push(self, text: str) -> str:
        if self._begins:
            text = text.lstrip()
            self._begins = not text
        text = self._blanks + text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        return kept

    def interrupt(self) -> None:
        """Something else follows."""
        self._begins, self._blanks = True, ""

    def rest(self) -> str:
        """The blanks at the end."""
        return self._blanks
