"""`POST /v1/chat/completions`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from ....proto.generation_pb2 import GenerateEvent, GenerateRequest
from ...text.answer_parser import Delta, ToolChoice
from ..call import Call
from ..common.checks import check_model, require_call
from ..common.events import explained, is_of_answer
from ..common.reading import ChatReader
from ..door import Endpoint
from ..sse import EventStream
from .answers import fingerprint_of, finish_of, usage_of
from .chat_stream import ChatStream
from .conversation import chat_of, tool_choice_of
from .logprobs import chat_logprobs, prompt_logprobs
from .sampling import chat_logprobs as asked_logprobs
from .sampling import most_tokens, priority_of, sampling_of
from .schema.requests import ChatRequest
from .schema.responses import ChatChunk, ChatCompletion


async def create(call: Call) -> Response:
    """Answers a conversation, at once or as a stream."""
    body = await call.body(ChatRequest)
    check_model(call, body.model)
    request, choice = _request(call, body)
    about = {
        "id": f"chatcmpl-{call.request_id}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": round(time.time()),
        "model": body.model or call.door.model.name,
        "system_fingerprint": fingerprint_of(call),
    }
    if body.stream:
        return EventStream(call, ChatStream(call, body, request, choice, about).produce)
    answers = Answers(call, body, request, choice)
    async with call.alive():
        await call.answer(request, answers.push, answers.reader.accept)
    return call.json({**about, **answers.whole()})


def _request(call: Call, body: ChatRequest) -> tuple[GenerateRequest, ToolChoice]:
    most = most_tokens(body, call.door.config.default_max_tokens)
    sampling = sampling_of(call, body, max_tokens=most, logprobs=asked_logprobs(body))
    chat, choice = chat_of(body), tool_choice_of(body)
    call.name_fields(**dict.fromkeys(("prompt", "chat", "unknown"), "messages"), template_kwargs="chat_template_kwargs")
    require_call(call, sampling, chat, choice, parallel=body.parallel_tool_calls is not False)
    request = call.generate_request(
        chat=chat,
        model=body.model or "",
        sampling=sampling,
        codec=body.codec or "",
        priority=priority_of(body),
        continue_final_message=bool(body.continue_final_message),
    )
    return request, choice


@dataclass
class _One:
    """One of the answers, as far as it has come."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None
    stop: str = ""

    def take(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self.content.append(delta.content)
            self.reasoning.append(delta.reasoning)
            if delta.tool_index is not None:
                if delta.tool_index == len(self.calls):
                    function = {"name": delta.tool_name, "arguments": []}
                    self.calls.append({"id": delta.tool_id, "type": "function", "function": function})
                self.calls[delta.tool_index]["function"]["arguments"].append(delta.tool_arguments)


class Answers:
    """Collects the answers of one call that is not a stream."""

    def __init__(self, call: Call, body: ChatRequest, request: GenerateRequest, choice: ToolChoice) -> None:
        self._call, self._body = call, body
        self._answers: dict[int, _One] = {}
        self.reader = ChatReader(call.door.model, request, choice)

    async def push(self, event: GenerateEvent) -> None:
        deltas = self.reader.read(event)
        if not is_of_answer(event):
            return
        one = self._answers.setdefault(event.choice, _One())
        one.take(deltas)
        one.token_ids += event.token_ids
        one.logprobs += event.logprobs
        if event.finish_reason:
            one.finish = finish_of(event, calls_tools=self.reader.calls_tools(event.choice))
            one.stop = event.stop_text

    def whole(self) -> dict[str, Any]:
        """All answers, once they are complete."""
        tally, body, prompt = self.reader.tally, self._body, self.reader.prompt
        tokenizer = self._call.door.model.tokenizer
        choices = [self._told(index, self._answers[index]) for index in sorted(self._answers)]
        found: dict[str, Any] = {"choices": choices, "usage": usage_of([tally])}
        if body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(tokenizer, prompt, tally.prompt_logprobs)
        if body.return_token_ids:
            found["prompt_token_ids"] = prompt
        if self._call.explain:
            found["isthmus"] = explained(tally.timings)
        return found

    def _told(self, index: int, one: _One) -> dict[str, Any]:
        content, reasoning = "".join(one.content), "".join(one.reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if one.calls:
            message["content"] = content or None
            for called in one.calls:
                called["function"]["arguments"] = "".join(called["function"]["arguments"])
            message["tool_calls"] = one.calls
        if reasoning and self._body.include_reasoning is not False:
            message["reasoning"] = message["reasoning_content"] = reasoning
        tokenizer = self._call.door.model.tokenizer
        told: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(tokenizer, one.token_ids, one.logprobs) if self._body.logprobs else None,
            "finish_reason": one.finish,
            "stop_reason": one.stop or None,
        }
        if self._body.return_token_ids:
            told["token_ids"] = one.token_ids
        return told


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/chat/completions",
        summary="Answers a conversation.",
        handle=create,
        request=ChatRequest,
        response=ChatCompletion,
        chunk=ChatChunk,
        errors=(404,),
    ),
)
