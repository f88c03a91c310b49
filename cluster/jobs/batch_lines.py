"""Lines of a batch file as requests: OpenAI's batch format, and plain {"prompt": ...}.

OpenAI's: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}, with the body of a chat
or of a text completion. Plain lines have `prompt` or `messages`, and beside them `custom_id` and sampling options.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...proto.errors import InvalidRequest
from ...proto.generation_pb2 import GenerateRequest
from ..client import build_request

Kind = Literal["chat", "completion", "plain"]
URLS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"),
)
HARMLESS = ("user", "metadata", "store", "service_tier", "stream", "safety_identifier", "prompt_cache_key")


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Body(BaseModel):
    """A completion of either kind. Options that would change the answer and are not known here are errors."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    messages: list[Message] | None = None
    prompt: str | None = None
    n: Literal[1] = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    max_tokens: int | None = Field(default=None, ge=0, lt=1 << 32)
    max_completion_tokens: int | None = Field(default=None, ge=0, lt=1 << 32)
    min_tokens: int | None = Field(default=None, ge=0, lt=1 << 32)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, value: Any) -> Any:
        """Leaves out what changes nothing about the answer."""
        return {k: v for k, v in value.items() if k not in HARMLESS} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_input(self) -> "Body":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("has both messages and prompt" if self.prompt is not None else "has no messages or prompt")
        return self

    def request(self, model: str) -> GenerateRequest:
        """As a request; `model` instead of the line's where it is not empty."""
        sampling = {name: getattr(self, name) for name in SAMPLING}
        sampling["max_tokens"] = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        sampling["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        chat = None if self.messages is None else [message.plain() for message in self.messages]
        return build_request(prompt=self.prompt, chat=chat, sampling=sampling, model=model or self.model)


class OpenAILine(BaseModel):
    """A line of OpenAI's batch format."""

    model_config = ConfigDict(extra="forbid")
    custom_id: str = Field(min_length=1)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"] = "/v1/chat/completions"
    body: Body


class PlainLine(Body):
    """A line with the prompt and its options."""

    custom_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that is fine."""

    number: int  # from 1
    custom_id: str | None
    kind: Kind
    request: GenerateRequest


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that is not, and why."""

    number: int
    custom_id: str | None
    reason: str


def read_lines(path: Path, *, model: str = "") -> Iterator[Line | BadLine]:
    """The lines of a file, blank ones left out. InvalidRequest where it cannot be read."""
    seen: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _unique(_line(number, raw, model), seen)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None


def read_requests(path: Path, *, model: str = "") -> list[GenerateRequest]:
    """All requests of a file; InvalidRequest where one line is bad, or there is none."""
    requests = []
    for line in read_lines(path, model=model):
        if isinstance(line, BadLine):
            raise InvalidRequest(f"{path}, line {line.number}: {line.reason}")
        requests.append(line.request)
    if not requests:
        raise InvalidRequest(f"{path} has no requests")
    return requests


def _line(number: int, raw: bytes, model: str) -> Line | BadLine:
    custom_id = None
    try:
        value = json.loads(raw)
        if not isinstance(value, dict):
            return BadLine(number=number, custom_id=None, reason="not a JSON object")
        custom_id = value.get("custom_id") if isinstance(value.get("custom_id"), str) else None
        if "body" in value or "url" in value or "method" in value:
            line = OpenAILine.model_validate(value)
            body, kind = line.body, URLS[line.url]
            if (kind == "chat") != (body.messages is not None):
                wanted = "messages" if kind == "chat" else "prompt"
                return BadLine(number=number, custom_id=custom_id, reason=f"{line.url} needs {wanted} in its body")
        else:
            body, kind = PlainLine.model_validate(value), "plain"
        return Line(number=number, custom_id=custom_id, kind=kind, request=body.request(model))
    except (ValidationError, ValueError) as error:
        return BadLine(number=number, custom_id=custom_id, reason=_reason(error))


def _unique(line: Line | BadLine, seen: dict[str, int]) -> Line | BadLine:
    if isinstance(line, BadLine) or line.custom_id is None:
        return line
    first = seen.setdefault(line.custom_id, line.number)
    if first == line.number:
        return line
    reason = f"custom_id {line.custom_id!r} was used in line {first} already"
    return BadLine(number=line.number, custom_id=line.custom_id, reason=reason)


def _reason(error: ValueError) -> str:
    """All that is wrong with a line, in one line."""
    if isinstance(error, ValidationError):
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            message = (
                "not supported" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
            )
            problems.append(f"{key}: {message}" if key else message)
        return "; ".join(problems)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start})"
    return f"not JSON: {error}"
