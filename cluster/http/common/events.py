"""Events of an answer, as all families of the API take them in."""

import json
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from ....proto.common_pb2 import TokenLogprobs
from ....proto.generation_pb2 import GenerateEvent, Timings


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
