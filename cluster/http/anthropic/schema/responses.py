"""What is answered, as models."""

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from ...common.told import Told

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(Told):
    """Tokens of a request; the whole prompt is in `input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class TextTold(Told):
    """What the model says."""

    type: Literal["text"]
    text: str


class ThinkingTold(Told):
    """What the model thinks."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseTold(Told):
    """A call of a tool; of one that the output ended in, what was complete."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


BlockTold = TextTold | ThinkingTold | ToolUseTold


class MessageTold(Told):
    """An answer; at the beginning of a stream without content."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockTold]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    isthmus: dict[str, Any] | None = None


class MessageStart(Told):
    """Before all blocks."""

    type: Literal["message_start"]
    message: MessageTold


class BlockStart(Told):
    """Before the pieces of a block."""

    type: Literal["content_block_start"]
    index: int
    content_block: BlockTold


class TextPiece(Told):
    """Of a block of text."""

    type: Literal["text_delta"]
    text: str


class ThinkingPiece(Told):
    """Of a block of thinking."""

    type: Literal["thinking_delta"]
    thinking: str


class InputPiece(Told):
    """Of a call's arguments, as JSON text."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(Told):
    """A piece of a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextPiece | ThinkingPiece | InputPiece


class BlockStop(Told):
    """After the last piece of a block."""

    type: Literal["content_block_stop"]
    index: int


class StopTold(Told):
    """Why the answer has ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageEnd(Told):
    """After all blocks."""

    type: Literal["message_delta"]
    delta: StopTold
    usage: MessageUsage
    isthmus: dict[str, Any] | None = None


class MessageStop(Told):
    """The last event."""

    type: Literal["message_stop"]


class Ping(Told):
    """A sign of life."""

    type: Literal["ping"]


class MessageEvent(
    RootModel[
        Annotated[
            MessageStart | BlockStart | BlockDelta | BlockStop | MessageEnd | MessageStop | Ping,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of a stream; its name is its `type`."""


class TokensCounted(Told):
    """How long a prompt is."""

    input_tokens: int
