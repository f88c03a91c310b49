"""What is answered, as models: for the OpenAPI document and for tests. Answers are made as plain data."""

from typing import Any, Literal

from ...common.told import Told

Finish = Literal["stop", "length", "tool_calls"]


class PromptDetails(Told):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(Told):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class TopLogprob(Told):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Told):
    """Of the tokens of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptLogprob(Told):
    """Of a token of the prompt, or one that could have stood there."""

    logprob: float
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionCall(Told):
    """What is called, and with what: JSON, which is incomplete where the output ended in it."""

    name: str
    arguments: str


class ToolCall(Told):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Told):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Told):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Told):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    isthmus: dict[str, Any] | None = None


class FunctionDelta(Told):
    """A piece of a call."""

    name: str | None = None
    arguments: str


class ToolDelta(Told):
    """A piece of a call; the first one has its id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(Told):
    """A piece of what the model says."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolDelta] | None = None


class ChatChunkChoice(Told):
    """A piece of one of the answers."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | None = None
    token_ids: list[int] | None = None


class ChatChunk(Told):
    """A piece of a stream of answers; the one with usage has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    isthmus: dict[str, Any] | None = None


class CompletionLogprobs(Told):
    """Of the tokens of a text; of the first one of a prompt there is none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Told):
    """One of the texts, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Told):
    """The texts that go on from the prompts, or a piece of a stream of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    isthmus: dict[str, Any] | None = None


class Tokenized(Told):
    """What a text was tokenized to."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Told):
    """The text of tokens."""

    prompt: str
