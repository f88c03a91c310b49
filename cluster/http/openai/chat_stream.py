"""A stream of `/v1/chat/completions`."""

from typing import Any

from ....proto.generation_pb2 import GenerateEvent, GenerateRequest
from ...text.answer_parser import Delta, ToolChoice
from ..call import Call
from ..common.events import dumps, is_of_answer
from ..common.reading import ChatReader
from ..sse import Write
from .answers import Chunks, explanation_of, finish_of, silence_of, usage_of
from .logprobs import chat_logprobs, prompt_logprobs
from .schema.requests import ChatRequest


class ChatStream:
    """Turns the events of one request into chunks."""

    def __init__(
        self, call: Call, body: ChatRequest, request: GenerateRequest, choice: ToolChoice, about: dict[str, Any]
    ) -> None:
        self._call, self._body, self._request = call, body, request
        options = body.stream_options
        self._last_usage = options is not None and bool(options.include_usage)
        self._every_usage = options is not None and bool(options.continuous_usage_stats)
        self._chunks = Chunks(about=about, with_usage=self._last_usage)
        self._reader = ChatReader(call.door.model, request, choice)
        self._tells_tokens = bool(body.logprobs or body.return_token_ids)

    async def produce(self, write: Write) -> None:
        """Writes all chunks; raises what ended the request."""

        async def push(event: GenerateEvent) -> None:
            await write(self._told(event) or silence_of(event))

        await self._call.answer(self._request, push, self._reader.accept)
        if self._last_usage:
            await write(self._chunks.chunk("", self._explanation(), usage_of([self._reader.tally])))

    def _told(self, event: GenerateEvent) -> bytes:
        """The chunks of one event; empty where it makes none."""
        index, told = event.choice, b""
        begins = not self._reader.has_begun(index)
        deltas = self._reader.read(event)
        if not is_of_answer(event):
            return b""
        if begins:
            told = self._chunk(index, '{"role":"assistant","content":""}', more=self._of_prompt())
        extra, more = self._extra(event)
        for delta in deltas:
            if (text := self._delta(delta)) is not None:
                told += self._chunk(index, text, **extra)
                extra = {}
        if event.finish_reason:
            finish = finish_of(event, calls_tools=self._reader.calls_tools(index))
            stop = dumps(event.stop_text or None)
            return told + self._chunk(index, "{}", **extra, finish=f'"{finish}","stop_reason":{stop}', more=more)
        if extra and self._tells_tokens:
            told += self._chunk(index, '{"content":""}', **extra)
        return told

    def _extra(self, event: GenerateEvent) -> tuple[dict[str, str], str]:
        """What the first chunk of an event tells of its tokens, and the last one of the whole stream."""
        extra: dict[str, str] = {}
        if self._tells_tokens and event.token_ids:
            if self._body.logprobs:
                tokenizer = self._call.door.model.tokenizer
                extra["logprobs"] = dumps(chat_logprobs(tokenizer, event.token_ids, event.logprobs))
            if self._body.return_token_ids:
                extra["tokens"] = f',"token_ids":{dumps(list(event.token_ids))}'
        alone = event.finish_reason and not self._last_usage and not event.choice
        return extra, self._explanation() if alone else ""

    def _delta(self, delta: Delta) -> str | None:
        if delta.tool_index is not None:
            call: dict[str, Any] = {"index": delta.tool_index}
            function = {"arguments": delta.tool_arguments}
            if delta.tool_id:
                call |= {"id": delta.tool_id, "type": "function"}
                function = {"name": delta.tool_name, **function}
            return dumps({"tool_calls": [{**call, "function": function}]})
        if delta.reasoning:
            if self._body.include_reasoning is False:
                return None
            return dumps({"reasoning": delta.reasoning, "reasoning_content": delta.reasoning})
        return f'{{"content":{dumps(delta.content)}}}' if delta.content else None

    def _chunk(
        self, index: int, delta: str, *, logprobs: str = "null", tokens: str = "", finish: str = "null", more: str = ""
    ) -> bytes:
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs}{tokens},"finish_reason":{finish}}}'
        usage = self._running_usage() if self._every_usage else None
        return self._chunks.chunk(choice, more, usage)

    def _running_usage(self) -> dict[str, Any]:
        self._reader.tally.prompt_tokens = len(self._reader.prompt)
        return usage_of([self._reader.tally])

    def _of_prompt(self) -> str:
        """What the first chunk of the first answer tells of the prompt."""
        told = ""
        if self._reader.begun > 1:
            return told
        if self._body.prompt_logprobs is not None:
            tokenizer = self._call.door.model.tokenizer
            found = prompt_logprobs(tokenizer, self._reader.prompt, self._reader.tally.prompt_logprobs)
            told += f',"prompt_logprobs":{dumps(found)}'
        if self._body.return_token_ids:
            told += f',"prompt_token_ids":{dumps(self._reader.prompt)}'
        return told

    def _explanation(self) -> str:
        return explanation_of(self._call, self._reader.tally)
