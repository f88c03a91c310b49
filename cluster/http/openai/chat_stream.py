"""A stream of `/v1/chat/completions`."""

from typing import Any

from ....proto.generation_pb2 import GenerateEvent, GenerateRequest
from ...requests.request import ResolvedRequest
from ...text.answer_parser import AnswerParser, Delta, ToolChoice
from ..call import Call
from ..sse import Write
from .answers import Chunks, Tally, dumps, explained, finish_of, is_of_answer, silence_of, usage_of
from .logprobs import chat_logprobs, prompt_logprobs
from .schema.requests import ChatRequest


class ChatStream:
    """Turns the events of one request into chunks."""

    def __init__(
        self, call: Call, body: ChatRequest, request: GenerateRequest, choice: ToolChoice, about: dict[str, Any]
    ) -> None:
        self._call, self._body, self._request, self._choice = call, body, request, choice
        options = body.stream_options
        self._last_usage = options is not None and bool(options.include_usage)
        self._every_usage = options is not None and bool(options.continuous_usage_stats)
        self._chunks = Chunks(about=about, with_usage=self._last_usage)
        self._prompt: list[int] = []
        self._parsers: dict[int, AnswerParser] = {}
        self._tally = Tally()
        self._tells_tokens = bool(body.logprobs or body.return_token_ids)

    async def produce(self, write: Write) -> None:
        """Writes all chunks; raises what ended the request."""

        async def push(event: GenerateEvent) -> None:
            await write(self._told(event) or silence_of(event))

        await self._call.answer(self._request, push, self._accept)
        if self._last_usage:
            await write(self._chunks.chunk("", self._explanation(), usage_of([self._tally])))

    def _accept(self, resolved: ResolvedRequest) -> None:
        self._prompt = resolved.prompt_token_ids

    def _told(self, event: GenerateEvent) -> bytes:
        """The chunks of one event; empty where it makes none."""
        self._tally.push(event)
        if not is_of_answer(event):
            return b""
        index, told = event.choice, b""
        parser = self._parsers.get(index)
        if parser is None:
            model = self._call.door.model
            parser = self._parsers[index] = model.new_answer_parser(self._request.chat, self._choice, self._prompt)
            told = self._chunk(index, '{"role":"assistant","content":""}', more=self._of_prompt())
        extra, more = self._extra(event)
        for delta in parser.push(event.text, event.token_ids):
            if (text := self._delta(delta)) is not None:
                told += self._chunk(index, text, **extra)
                extra = {}
        if event.finish_reason:
            for delta in parser.finish():
                if (text := self._delta(delta)) is not None:
                    told += self._chunk(index, text, **extra)
                    extra = {}
            finish = finish_of(event, calls_tools=bool(parser.tool_calls))
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
        self._tally.prompt_tokens = len(self._prompt)
        return usage_of([self._tally])

    def _of_prompt(self) -> str:
        """What the first chunk of the first answer tells of the prompt."""
        told = ""
        if len(self._parsers) > 1:
            return told
        if self._body.prompt_logprobs is not None:
            tokenizer = self._call.door.model.tokenizer
            found = prompt_logprobs(tokenizer, self._prompt, self._tally.prompt_logprobs)
            told += f',"prompt_logprobs":{dumps(found)}'
        if self._body.return_token_ids:
            told += f',"prompt_token_ids":{dumps(self._prompt)}'
        return told

    def _explanation(self) -> str:
        if not self._call.explain or self._tally.timings is None:
            return ""
        return f',"isthmus":{dumps(explained(self._tally.timings))}'
