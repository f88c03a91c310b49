"""The fields of requests that `/v1/chat/completions` and `/v1/completions` have in common, as clients send them.

Beside those of OpenAI there are the ones that vLLM has added and clients send. A field of type None is one of OpenAI's
that means nothing here: only null is allowed.
"""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from .....proto.sampling import MAX_SEED
from ...body import Body

MAX_CHOICES = 64
Unsupported: TypeAlias = None
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Options = Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)]
PriorityName = Literal["interactive", "standard", "batch"]


class StreamOptions(Body):
    """What a stream tells besides."""

    include_usage: bool | None = None  # in a chunk of its own before the end
    continuous_usage_stats: bool | None = None  # of vLLM: in every chunk
    include_obfuscation: bool | None = None  # no chunk is ever padded here


class JsonSchema(Body):
    """A schema that the output must be valid for."""

    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None  # it is always kept to


class ResponseFormat(Body):
    """What the output is: any text, any JSON object, or JSON that is valid for a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema; allowed: both, or none of them")
        return self


class StructuredOutputs(Body):
    """What the output must be, as vLLM names it. One of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Options | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingFields(Body):
    """How an answer is drawn, where it ends, and what it must be."""

    model: str | None = Field(default=None, description="Default: the one that is served.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=0, lt=1 << 31)
    min_tokens: int | None = Field(default=None, ge=0, lt=1 << 31)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)  # -1 and 0: no limit
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(1 << 63), le=MAX_SEED)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=1024, description="By token id."
    )
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Options | None = None
    guided_grammar: str | None = Field(default=None, description="In llguidance's variant of Lark's syntax.")
    user: str | None = None
    priority: PriorityName | int | None = Field(
        default=None, description="Of numbers: below 0 interactive, above 0 batch."
    )
    codec: str | None = Field(default=None, description="Of the KV transfer.")
    # Of vLLM: what is so here in any case.
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options without stream; allowed: with stream: true")
        return self
