"""`POST /v1/messages` and `/v1/messages/count_tokens`."""

import json
from typing import Any

from starlette.responses import Response

from ....proto.common_pb2 import FINISH_REASON_LENGTH, Grammar, SamplingParams
from ....proto.generation_pb2 import GenerateEvent, GenerateRequest
from ...requests.request import validate
from ...text.answer_parser import ToolChoice
from ..call import Call
from ..common.checks import check_model, require_call
from ..common.events import dumps, explained, is_of_answer
from ..common.reading import ChatReader
from ..door import Endpoint
from ..sse import EventStream, Write, data
from .blocks import AnswerBlock, blocks_for
from .conversation import chat_of, continues, is_parallel, tool_choice_of
from .dialect import ANTHROPIC
from .schema.requests import CountRequest, MessagesRequest
from .schema.responses import MessageEvent, MessageTold, TokensCounted


async def create(call: Call) -> Response:
    """Answers a conversation, at once or as a stream."""
    body = await call.body(MessagesRequest)
    check_model(call, body.model)
    request, choice = _request(call, body)
    answer = MessageAnswer(call, body, request, choice)
    if body.stream:
        return EventStream(call, answer.produce, last=_event({"type": "message_stop"}), alive=PING)
    return call.json(await answer.whole())


async def count(call: Call) -> Response:
    """The tokens of a conversation, as a request with it would have them."""
    body = await call.body(CountRequest)
    check_model(call, body.model)
    request = GenerateRequest(model=body.model or "", chat=chat_of(body), continue_final_message=continues(body))
    async with call.alive():
        resolved = await validate(request, call.door.model)
    return call.json({"input_tokens": len(resolved.prompt_token_ids)})


def _request(call: Call, body: MessagesRequest) -> tuple[GenerateRequest, ToolChoice]:
    same = ("temperature", "top_p", "top_k", "max_tokens")  # that are named, and mean, the same on the wire
    sampling = SamplingParams(
        **{name: value for name in same if (value := getattr(body, name)) is not None}, stop=body.stop_sequences or ()
    )
    if body.output_config is not None and body.output_config.format is not None:
        sampling.grammar.CopyFrom(Grammar(json_schema=json.dumps(body.output_config.format.schema_)))
    chat, choice = chat_of(body), tool_choice_of(body)
    require_call(call, sampling, chat, choice, parallel=is_parallel(body))
    request = call.generate_request(
        chat=chat, model=body.model or "", sampling=sampling, continue_final_message=continues(body)
    )
    return request, choice


class MessageAnswer:
    """The one answer to a request."""

    def __init__(self, call: Call, body: MessagesRequest, request: GenerateRequest, choice: ToolChoice) -> None:
        self._call, self._request = call, request
        self._model = body.model or call.door.model.name
        self._reader = ChatReader(call.door.model, request, choice)
        self._blocks = blocks_for(body, parallel=is_parallel(body))
        self._index = -1  # of the block that is open

    async def whole(self) -> dict[str, Any]:
        """The message, once it is complete; raises what ended the request."""
        found, ended = list[AnswerBlock](), dict[str, Any]()

        async def push(event: GenerateEvent) -> None:
            for block, begins, piece in self._blocks.place(self._reader.read(event)):
                if begins:
                    found.append(block)
                block.pieces.append(piece)
            if event.finish_reason:
                ended.update(self._stop(event))

        async with self._call.alive():
            await self._call.answer(self._request, push, self._reader.accept)
        return {**self._message([block.whole() for block in found]), **ended, "usage": self._usage(), **self._more()}

    async def produce(self, write: Write) -> None:
        """Writes all events but the last one; raises what ended the request."""
        started = False

        async def push(event: GenerateEvent) -> None:
            nonlocal started
            deltas = self._reader.read(event)
            told = b"" if started else _event({"type": "message_start", "message": self._message([])})
            started = True
            for block, begins, piece in self._blocks.place(deltas):
                told += self._open(block) if begins else b""
                told += self._piece(block, piece) if piece else b""
            if event.finish_reason:
                told += self._close() + self._end(event)
            await write(told or (b"" if is_of_answer(event) else PING))

        await self._call.answer(self._request, push, self._reader.accept)

    def _end(self, event: GenerateEvent) -> bytes:
        ended = {"type": "message_delta", "delta": self._stop(event), "usage": self._usage()}
        return _event({**ended, **self._more()})

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._call.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """Nothing is said of caches: that would be no part of `input_tokens`, and is known at the end alone."""
        return {
            "input_tokens": len(self._reader.prompt),
            "output_tokens": self._reader.tally.output_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }

    def _stop(self, event: GenerateEvent) -> dict[str, str | None]:
        """Why the answer has ended with this event."""
        if event.finish_reason == FINISH_REASON_LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if event.stop_text:
            return {"stop_reason": "stop_sequence", "stop_sequence": event.stop_text}
        called = self._reader.calls_tools(event.choice)
        return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}

    def _more(self) -> dict[str, Any]:
        told = explained(self._reader.tally.timings) if self._call.explain else None
        return {} if told is None else {"isthmus": told}

    def _open(self, block: AnswerBlock) -> bytes:
        closed = self._close()
        self._index += 1
        return closed + _event({"type": "content_block_start", "index": self._index, "content_block": block.opening})

    def _close(self) -> bytes:
        return _event({"type": "content_block_stop", "index": self._index}) if self._index >= 0 else b""

    def _piece(self, block: AnswerBlock, piece: str) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": block.delta(piece)})


def _event(content: dict[str, Any]) -> bytes:
    return data(dumps(content), content["type"])


PING = _event({"type": "ping"})

ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/messages",
        summary="Answers a conversation, as Anthropic's API does.",
        handle=create,
        request=MessagesRequest,
        response=MessageTold,
        chunk=MessageEvent,
        dialect=ANTHROPIC,
        errors=(404,),
    ),
    Endpoint(
        method="POST",
        path="/v1/messages/count_tokens",
        summary="Counts the tokens of a conversation.",
        handle=count,
        request=CountRequest,
        response=TokensCounted,
        dialect=ANTHROPIC,
        errors=(404,),
    ),
)
