"""What is sent to `/v1/chat/completions`, `/v1/completions`, `/tokenize` and `/detokenize`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ...body import Body
from .fields import SamplingFields, TokenId, Unsupported

MAX_PROMPTS = 1024  # of one request


class TextPart(Body):
    """A piece of a message. There are others in the API: images, audio, files."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """What a call of a tool calls, and with what."""

    name: str
    arguments: str


class ToolCallSent(Body):
    """A call of a tool, in the conversation so far."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallSent], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    # What an answer has that is sent back as it came.
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: list[Any] | None = Field(default=None, max_length=0)


class FunctionOffered(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolOffered(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionOffered


class FunctionName(Body):
    """Which function."""

    name: str


class ToolNamed(Body):
    """The one tool that the model must call."""

    type: Literal["function"]
    function: FunctionName


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]
Tools = Annotated[list[ToolOffered], Field(max_length=128, fail_fast=True)]


class ChatRequest(SamplingFields):
    """A conversation that the model shall go on."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolNamed | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # Of no effect here.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    verbosity: Literal["medium"] | None = None
    echo: Literal[False] | None = None
    chat_template: Unsupported = None
    documents: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None


Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """Texts that the model shall go on."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, description="Only as many as n.")
    suffix: Unsupported = None


class TokenizeRequest(Body):
    """A text, or a conversation, to tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: Literal[True] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Tokens whose text is asked for."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
