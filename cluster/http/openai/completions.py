"""`POST /v1/completions`."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import Response

from ....proto.generation_pb2 import GenerateRequest, TokenIds
from ....proto.tasks import together
from ..call import Call
from ..common.checks import check_model
from ..common.events import dumps, explained
from ..door import Endpoint
from ..sse import EventStream, Write
from .answers import Chunks, explanation_of, fingerprint_of, silence_of, usage_of
from .sampling import check_completion, priority_of, sampling_of
from .schema.requests import CompletionRequest
from .schema.responses import Completion
from .texts import Texts

MAX_TOKENS = 16  # of a request that does not say, as the API has it
AT_ONCE = 16  # prompts of one call


async def create(call: Call) -> Response:
    """Goes on from one text or several, at once or as a stream."""
    body = await call.body(CompletionRequest)
    check_model(call, body.model)
    check_completion(body)
    about = {
        "id": f"cmpl-{call.request_id}",
        "object": "text_completion",
        "created": round(time.time()),
        "model": body.model or call.door.model.name,
        "system_fingerprint": fingerprint_of(call),
    }
    requests = _requests(call, body)
    texts = [Texts(call.door.model, body, request, number) for number, request in enumerate(requests)]
    if body.stream:
        return EventStream(call, _Stream(call, body, requests, texts, about).produce)

    async def nothing(event: bytes) -> None:
        pass

    async with call.alive():
        await _answer(call, requests, texts, lambda each: each.collect, nothing)
    found: dict[str, Any] = {"choices": [choice for each in texts for choice in each.whole()]}
    found["usage"] = usage_of([each.tally for each in texts])
    if call.explain:
        found["isthmus"] = explained(texts[0].tally.timings)
    return call.json({**about, **found})


def _requests(call: Call, body: CompletionRequest) -> list[GenerateRequest]:
    prompts = _prompts(body)
    most = MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    if body.max_tokens is None:
        most = max(most, body.min_tokens or 0)
    sampling = sampling_of(call, body, max_tokens=most, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None and not sampling.HasField("prompt_logprobs"):
        sampling.prompt_logprobs = body.logprobs
    return [
        call.generate_request(
            number if len(prompts) > 1 else None,
            **({"prompt": prompt} if isinstance(prompt, str) else {"tokens": TokenIds(ids=prompt)}),
            model=body.model or "",
            sampling=sampling,
            codec=body.codec or "",
            priority=priority_of(body),
        )
        for number, prompt in enumerate(prompts)
    ]


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [each for each in prompt if isinstance(each, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]


class _Stream:
    """Turns the events of all requests of a call into chunks of one stream."""

    def __init__(
        self,
        call: Call,
        body: CompletionRequest,
        requests: Sequence[GenerateRequest],
        texts: "Sequence[Texts]",
        about: dict[str, Any],
    ) -> None:
        self._call, self._requests, self._texts = call, requests, texts
        options = body.stream_options
        self._last_usage = options is not None and bool(options.include_usage)
        self._every_usage = options is not None and bool(options.continuous_usage_stats)
        self._chunks = Chunks(about=about, with_usage=self._last_usage)

    async def produce(self, write: Write) -> None:
        """Writes all chunks; raises what ended the first request that failed."""
        await _answer(self._call, self._requests, self._texts, self._chunked, write)
        if self._last_usage or self._call.explain:
            usage = self._usage() if self._last_usage else None
            await write(self._chunks.chunk("", self._explanation(), usage))

    def _chunked(self, texts: Texts) -> Callable[[Any], bytes]:
        def told(event: Any) -> bytes:
            choice = texts.piece(event)
            if choice is None:
                return silence_of(event)
            return self._chunks.chunk(dumps(choice), usage=self._usage() if self._every_usage else None)

        return told

    def _usage(self) -> dict[str, Any]:
        return usage_of([each.tally for each in self._texts])

    def _explanation(self) -> str:
        return explanation_of(self._call, self._texts[0].tally)


async def _answer(
    call: Call,
    requests: Sequence[GenerateRequest],
    texts: Sequence[Texts],
    told: Callable[[Texts], Callable[[Any], bytes]],
    write: Write,
) -> None:
    """Answers all requests, AT_ONCE at a time; raises what ended the first one that failed."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(request: GenerateRequest, each: Texts) -> None:
        tell = told(each)

        async def push(event: Any) -> None:
            await write(tell(event))

        async with turns:
            await call.answer(request, push, each.accept)

    if len(requests) == 1:
        return await one(requests[0], texts[0])
    await together([one(request, each) for request, each in zip(requests, texts, strict=True)])


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/completions",
        summary="Goes on from texts.",
        handle=create,
        request=CompletionRequest,
        response=Completion,
        chunk=Completion,
        errors=(404,),
    ),
)
