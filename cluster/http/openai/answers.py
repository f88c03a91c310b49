"""Events of an answer as the API tells them: what a whole answer and a stream of it have in common."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from ....proto.common_pb2 import FINISH_REASON_LENGTH, FinishReason, TokenLogprobs
from ....proto.generation_pb2 import GenerateEvent, Timings
from ..sse import COMMENT, data


@dataclass
class Tally:
    """What one request to the model has come to, over all of its answers."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    timings: Timings | None = None  # of the first answer

    def push(self, event: GenerateEvent) -> None:
        """Takes in an event."""
        self.output_tokens += len(event.token_ids)
        if event.prompt_logprobs:
            self.prompt_logprobs.extend(event.prompt_logprobs)
        if event.finish_reason:
            self.prompt_tokens = event.usage.prompt_tokens or self.prompt_tokens
            if not event.choice:
                self.timings = event.timings
                transfer = event.timings.transfer
                self.cached_tokens = transfer.held_tokens + transfer.cached_tokens + transfer.stored_tokens


def is_of_answer(event: GenerateEvent) -> bool:
    """Whether an event has something of an answer: not where it is a sign of life, or tells of the prompt."""
    return bool(event.token_ids or event.text or event.finish_reason)


def silence_of(event: GenerateEvent) -> bytes:
    """What a stream is given for an event that makes no chunk: a comment for a sign of life."""
    return b"" if event.prompt_logprobs or is_of_answer(event) else COMMENT


def usage_of(tallies: Sequence[Tally]) -> dict[str, Any]:
    """The tokens of a call."""
    prompt, output = sum(each.prompt_tokens for each in tallies), sum(each.output_tokens for each in tallies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in tallies)},
    }


def finish_of(event: GenerateEvent, *, calls_tools: bool = False) -> str | None:
    """Why an answer has ended with this event; None: it has not."""
    reason: FinishReason.ValueType = event.finish_reason
    if not reason:
        return None
    if reason == FINISH_REASON_LENGTH:
        return "length"
    return "tool_calls" if calls_tools else "stop"


def explained(timings: Timings | None) -> dict[str, Any] | None:
    """What an answer took, as plain data."""
    return None if timings is None else plain(timings)


def plain(message: Message) -> dict[str, Any]:
    """The fields of a message that are set, by their names; numbers stay numbers, as `MessageToDict` has them not."""
    return {field.name: _plain(value) for field, value in message.ListFields()}


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    return [_plain(each) for each in value] if hasattr(value, "extend") else value


def dumps(value: Any) -> str:
    """As JSON, without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Chunks:
    """Makes the chunks of one stream: what they have in common is put into JSON once."""

    def __init__(self, *, about: dict[str, Any], with_usage: bool) -> None:
        """`about`: what every chunk begins with. `with_usage`: they have a field for it, null but in the last."""
        self._head = dumps(about)[:-1] + ',"choices":['
        self._null = '],"usage":null}' if with_usage else "]}"

    def chunk(self, choice: str, more: str = "", usage: dict[str, Any] | None = None) -> bytes:
        """One with a choice, or none (""), as JSON; `more`: further fields of the chunk, each behind a comma."""
        tail = self._null if usage is None else f'],"usage":{dumps(usage)}}}'
        return data(f"{self._head}{choice}{tail[:-1]}{more}}}")
