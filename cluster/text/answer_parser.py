"""An answer's text as an API tells it: content, reasoning and calls of tools, piece by piece.

parser = model.new_answer_parser(request.chat, choice, resolved.prompt_token_ids)  # one for each of the n answers
for delta in parser.push(event.text, event.token_ids): ...
for delta in parser.finish(): ...
"""

import secrets
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model calls a tool: `auto` as it likes, `required` one or more of them."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str = ""  # with `required`: the only one that it may call


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of an answer: content, or reasoning, or of one call of a tool.

    A call begins with a delta that has `tool_id` and `tool_name`. Its arguments are the `tool_arguments` of all deltas
    with its `tool_index`, joined: JSON text, which is incomplete where the output ended inside it.
    """

    content: str = ""
    reasoning: str = ""
    tool_index: int | None = None  # which call of this answer, from 0
    tool_id: str = ""
    tool_name: str = ""
    tool_arguments: str = ""


class Part(Protocol):
    """A piece of an answer (`model/text/answers/reader.py`)."""

    @property
    def kind(self) -> Literal["content", "reasoning", "call", "arguments"]: ...
    @property
    def text(self) -> str: ...


class Reader(Protocol):
    """Tells apart what a model writes (`model/text/answers/reader.py`)."""

    def push(self, text: str, /) -> Iterable[Part]: ...
    def finish(self) -> Iterable[Part]: ...


class Markers(Protocol):
    """Puts back tokens without a text that mean something to the reader (`model/text/answers/markers.py`)."""

    def push(self, text: str, token_ids: Sequence[int], /) -> str: ...


class AnswerParser:
    """Reads one answer."""

    def __init__(self, reader: Reader | None = None, markers: Markers | None = None) -> None:
        """No `reader`: all is content."""
        self._reader, self._markers = reader, markers
        self.tool_calls = 0  # begun so far

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Delta]:
        """What became certain with one event's text and tokens. Never raises: what is no call is content."""
        if self._reader is None:
            return [Delta(content=text)] if text else []
        if self._markers is not None:
            text = self._markers.push(text, token_ids)
        return [self._delta(part) for part in self._reader.push(text)]

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        return [self._delta(part) for part in self._reader.finish()] if self._reader else []

    def _delta(self, part: Part) -> Delta:
        if part.kind == "content":
            return Delta(content=part.text)
        if part.kind == "reasoning":
            return Delta(reasoning=part.text)
        if part.kind == "call":
            self.tool_calls += 1
            return Delta(tool_index=self.tool_calls - 1, tool_id=new_tool_id(), tool_name=part.text)
        return Delta(tool_index=self.tool_calls - 1, tool_arguments=part.text)


def new_tool_id() -> str:
    """An id of a call: nine letters and digits, for the chat templates of Mistral refuse any other."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))
