"""An answer's text as an API tells it: content, reasoning and calls of tools, piece by piece.

parser = model.new_answer_parser(request.chat, choice, resolved.prompt_token_ids)  # one for each of the n answers
for delta in parser.push(event.text, event.token_ids): ...
for delta in parser.finish(): ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


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


class AnswerParser:
    """Reads one answer."""

    def __init__(self) -> None:
        self.tool_calls = 0  # begun so far

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Delta]:
        """What became certain with one event's text and tokens. Never raises: what is no call is content."""
        del token_ids
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        return []
