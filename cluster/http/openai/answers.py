"""Events of an answer as the API tells them: what a whole answer and a stream of it have in common."""

from collections.abc import Sequence
from typing import Any

from ....proto.common_pb2 import FINISH_REASON_LENGTH, FinishReason
from ....proto.generation_pb2 import GenerateEvent
from ..call import Call
from ..common.events import Tally, dumps, explained, is_of_answer
from ..sse import COMMENT, data


def fingerprint_of(call: Call) -> str:
    """What the model's outputs depend on besides the request, as the API names it."""
    return f"isthmus-{call.door.model.fingerprint[:16]}"


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


def explanation_of(call: Call, tally: Tally) -> str:
    """A field of a chunk with what the answer took, behind a comma; empty where that was not asked for, or is not known
    yet."""
    if not call.explain or tally.timings is None:
        return ""
    return f',"isthmus":{dumps(explained(tally.timings))}'


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
