"""What is sent to `/v1/messages` and `/v1/messages/count_tokens`. A field of type None is one of Anthropic's that means
nothing here: only null is allowed."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from ...body import Body
from .blocks import Block, CacheControl, Cached, OnlyText

Unsupported: TypeAlias = None
StopSequence = Annotated[str, Field(min_length=1, max_length=256)]
Texts = Annotated[list[OnlyText], Field(fail_fast=True)]

# Which blocks a message of a role may have.
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
}


class Turn(Body):
    """One message of a conversation; those of one role that follow each other are one turn."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _has_its_blocks(self) -> Self:
        allowed = _BLOCKS[self.role]
        for block in self.content if isinstance(self.content, list) else ():
            if block.type not in allowed:
                kinds = ", ".join(allowed)
                raise ValueError(f"a {block.type} block in a message of role {self.role}; allowed: {kinds}")
        return self


class CustomTool(Cached):
    """A tool that the model may call, and that the client runs."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(default=None, description="The schema is kept to where a call is required.")
    eager_input_streaming: bool | None = Field(default=None, description="Of no effect: arguments come as written.")
    defer_loading: Literal[False] | None = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(fail_fast=True)] | None = None
    input_examples: Unsupported = None


class Choice(Body):
    """Whether a tool is called: `any` one or more, `tool` the one that is named."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_its_tool(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name goes with type tool; allowed: both, or none of them")
        if self.type == "none" and self.disable_parallel_tool_use is not None:
            raise ValueError("disable_parallel_tool_use with type none; allowed: with auto, any or tool")
        return self


class Thinking(Body):
    """Whether the model thinks before it answers, where its chat template lets that be chosen."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(
        default=None, ge=1024, lt=1 << 31, description="Not kept to: max_tokens bounds thinking and answer together."
    )
    display: Literal["summarized", "omitted"] | None = Field(default=None, description="`omitted` leaves it out.")

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError("budget_tokens goes with type enabled; allowed: both, or none of them")
        return self


class OutputFormat(Body):
    """A schema that the text must be valid for."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """What the answer is like."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="The variable `reasoning_effort` of the chat template."
    )
    format: OutputFormat | None = None


class Metadata(Body):
    """Of no effect here."""

    user_id: str | None = Field(default=None, max_length=512)


class CountRequest(Body):
    """A conversation whose tokens are asked for."""

    model: str | None = Field(default=None, description="Default: the one that is served.")
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    system: str | Texts | None = None
    tools: Annotated[list[CustomTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
    context_management: Unsupported = None
    user_profile_id: Unsupported = None
    workspace_id: Unsupported = None


class MessagesRequest(CountRequest):
    """A conversation that the model shall go on."""

    max_tokens: int = Field(ge=1, lt=1 << 31)
    stream: bool | None = None
    stop_sequences: Annotated[list[StopSequence], Field(max_length=16, fail_fast=True)] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Unsupported = None
    diagnostics: Unsupported = None
    inference_geo: Unsupported = None

    @model_validator(mode="after")
    def _has_room_for_its_budget(self) -> Self:
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise ValueError("thinking.budget_tokens is not below max_tokens; allowed: a smaller budget")
        return self
