"""The blocks that messages are made of, as clients send them. What a model of text has no use for is refused by its
name: images, documents, search results, tools that a server runs."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from .....proto.errors import shown
from ...body import Body


class CacheControl(Body):
    """Of no effect: what prompts have in common is kept in any case."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Cached(Body):
    """What may have a mark for a cache."""

    cache_control: CacheControl | None = None


class TextBlock(Cached):
    """Text."""

    type: Literal["text"]
    text: str
    citations: Annotated[list[Any], Field(max_length=0)] | None = None  # an answer that is sent back has null


class ThinkingBlock(Body):
    """What the assistant thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str = Field(default="", description="Nothing is signed here, and nothing checked.")


class DirectCaller(Body):
    """Who calls: the model itself."""

    type: Literal["direct"]


class ToolUseBlock(Cached):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=128)
    name: str
    input: dict[str, Any]
    caller: DirectCaller | None = None


def _type_of(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


def _tags(tags: dict[str, str]) -> tuple[Callable[[Any], str | None], Callable[[Any], Any]]:
    """What finds the member of a union by its `type`, and what refuses every other type; in the paths of errors a tag
    with a capital is no field."""

    def find(block: Any) -> str | None:
        kind = _type_of(block)
        return tags.get(kind) if isinstance(kind, str) else None

    def check(block: Any) -> Any:
        if find(block) is None:
            kind = _type_of(block)
            what = f"type {shown(kind)} is not supported here" if isinstance(kind, str) else "has no type"
            raise ValueError(f"{what}; allowed: {', '.join(tags)}")
        return block

    return find, check


_, _check_text = _tags({"text": "TextBlock"})
OnlyText = Annotated[TextBlock, BeforeValidator(_check_text)]


class ToolResultBlock(Cached):
    """What a tool has answered."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=128)
    content: str | Annotated[list[OnlyText], Field(fail_fast=True)] | None = None
    is_error: bool | None = Field(default=None, description="No chat template knows it: the content has to say it.")


_of_message, _check_message = _tags(
    {
        "text": "TextBlock",
        "thinking": "ThinkingBlock",
        "tool_use": "ToolUseBlock",
        "tool_result": "ToolResultBlock",
    }
)
Block = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")],
    Discriminator(_of_message),
    BeforeValidator(_check_message),
]
