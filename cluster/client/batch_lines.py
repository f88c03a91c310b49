"""Lines of a batch file as requests: OpenAI's batch format, and plain {"prompt": ...}.

Whatever is wrong with one line is a `BadLine` with its reason, and touches no other.

OpenAI's: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}, with the body of a chat
or of a text completion. Plain lines have `prompt` or `messages`, and beside them `custom_id` and sampling options.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...proto.errors import InvalidRequest
from ...proto.generation_pb2 import GenerateRequest
from .client import build_request

Kind = Literal["chat", "completion", "plain"]
URLS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"),
)
MAX_REQUEST_BYTES = (4 << 20) - (64 << 10)  # a gateway takes messages of 4 MiB, in which a job says more than this
MAX_LINE_BYTES = 32 << 20  # of text, in which a character may be written as \u and four digits
MAX_REASON = 1000  # characters
MAX_PROBLEMS = 8  # of one line, that are told
MAX_NAME = 200  # characters of a field's name in them
Uint32 = Annotated[int, Field(ge=0, lt=1 << 32)]
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

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: str = ""
    messages: list[Message] | None = None
    prompt: str | None = None
    n: Literal[1] = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: Uint32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    max_tokens: Uint32 | None = None
    max_completion_tokens: Uint32 | None = None
    min_tokens: Uint32 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Uint32] | None = None
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
            for number, raw in enumerate(_raw_lines(file), start=1):
                if raw is None:
                    reason = f"more than {MAX_LINE_BYTES >> 20} MiB of text"
                    yield BadLine(number=number, custom_id=None, reason=reason)
                elif raw.removeprefix(codecs.BOM_UTF8).strip():
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


def _raw_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long to be looked at."""
    while raw := file.readline(MAX_LINE_BYTES + 1):
        too_long = len(raw) > MAX_LINE_BYTES
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES + 1)  # what is left of it
        yield None if too_long else raw


def _line(number: int, raw: bytes, model: str) -> Line | BadLine:
    custom_id = None
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text)
        if not isinstance(value, dict):
            return BadLine(number=number, custom_id=None, reason="not a JSON object")
        custom_id = value.get("custom_id") if isinstance(value.get("custom_id"), str) else None
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate is no character: it has no UTF-8
        if "body" in value or "url" in value or "method" in value:
            line = OpenAILine.model_validate(value)
            body, kind = line.body, URLS[line.url]
            if (kind == "chat") != (body.messages is not None):
                wanted = "messages" if kind == "chat" else "prompt"
                return BadLine(number=number, custom_id=custom_id, reason=f"{line.url} needs {wanted} in its body")
        else:
            body, kind = PlainLine.model_validate(value), "plain"
        request = body.request(model)
        if (size := request.ByteSize()) > MAX_REQUEST_BYTES:
            reason = f"a request of {size} bytes; allowed: {MAX_REQUEST_BYTES}"
            return BadLine(number=number, custom_id=custom_id, reason=reason)
        return Line(number=number, custom_id=custom_id, kind=kind, request=request)
    except Exception as error:  # what nobody has thought of is wrong with this line alone, too
        return BadLine(number=number, custom_id=custom_id, reason=_reason(error))


def _unique(line: Line | BadLine, seen: dict[str, int]) -> Line | BadLine:
    if isinstance(line, BadLine) or line.custom_id is None:
        return line
    first = seen.setdefault(line.custom_id, line.number)
    if first == line.number:
        return line
    reason = f"custom_id {line.custom_id!r} was used in line {first} already"
    return BadLine(number=line.number, custom_id=line.custom_id, reason=reason)


def _reason(error: Exception) -> str:
    """What is wrong with a line, in one line that can be printed."""
    return _text_of(error)[:MAX_REASON].encode(errors="backslashreplace").decode()


def _text_of(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problems, found = [], error.errors(include_url=False, include_context=False, include_input=False)
        for item in found[:MAX_PROBLEMS]:
            key = ".".join(str(part) for part in item["loc"])[:MAX_NAME]
            message = (
                "not supported" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
            )
            problems.append(f"{key}: {message}" if key else message)
        more = len(found) - len(problems)
        return "; ".join(problems) + (f"; and {more} more" if more else "")
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, UnicodeEncodeError):
        return "has half a surrogate (\\ud800 to \\udfff), which stands for no character"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{type(error).__name__}: {error}"
