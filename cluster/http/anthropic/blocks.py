"""The blocks that an answer is told in: what was read of it, put into those that it is a piece of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic_core

from ...text.answer_parser import Delta
from .schema.requests import CountRequest


@dataclass
class AnswerBlock:
    """One block, as far as it has come."""

    kind: Literal["text", "thinking", "tool_use"]
    tool_index: int | None = None
    tool_id: str = ""
    tool_name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def opening(self) -> dict[str, Any]:
        """The block without its pieces."""
        if self.kind == "text":
            return {"type": "text", "text": ""}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "tool_use", "id": self.tool_id, "name": self.tool_name, "input": {}}

    def delta(self, piece: str) -> dict[str, Any]:
        """A piece of it."""
        if self.kind == "text":
            return {"type": "text_delta", "text": piece}
        if self.kind == "thinking":
            return {"type": "thinking_delta", "thinking": piece}
        return {"type": "input_json_delta", "partial_json": piece}

    def whole(self) -> dict[str, Any]:
        """All of it."""
        text = "".join(self.pieces)
        if self.kind == "tool_use":
            return {**self.opening, "input": _object(text)}
        return {**self.opening, self.kind: text}


class Blocks:
    """Tells which block each piece of an answer belongs to."""

    def __init__(self, *, thinking: bool, parallel: bool) -> None:
        """`thinking`: whether it is told; `parallel`: whether calls after the first one are."""
        self._thinking, self._parallel = thinking, parallel
        self._last: AnswerBlock | None = None

    def place(self, deltas: Iterable[Delta]) -> Iterator[tuple[AnswerBlock, bool, str]]:
        """Block, whether it begins with this piece, and the piece, which may be empty where it begins."""
        for delta in deltas:
            kind = "tool_use" if delta.tool_index is not None else "thinking" if delta.reasoning else "text"
            piece = delta.tool_arguments or delta.reasoning or delta.content
            if kind == "thinking" and not self._thinking:
                continue
            if delta.tool_index and not self._parallel:
                continue
            last = self._last
            begins = last is None or (last.kind, last.tool_index) != (kind, delta.tool_index)
            if begins:
                if kind != "tool_use" and not piece:
                    continue
                last = self._last = AnswerBlock(kind, delta.tool_index, delta.tool_id, delta.tool_name)
            assert last is not None
            if begins or piece:
                yield last, begins, piece


def blocks_for(body: CountRequest, *, parallel: bool) -> Blocks:
    """For the answer to a request."""
    asked = body.thinking
    hidden = asked is not None and (asked.type == "disabled" or asked.display == "omitted")
    return Blocks(thinking=not hidden, parallel=parallel)


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call; where the output ended inside them, those that were complete."""
    try:
        found = pydantic_core.from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
