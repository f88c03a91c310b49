"""OpenAI's own client, unprepared, against a small model: what it gets is what gRPC gives, and what its types say."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from http_door import http_client
from served_http import served_http

from isthmus.cluster.client.client import Answer, Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.http.openai.schema.responses import ChatChunk, ChatCompletion, Completion

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
PROMPT = "Once upon a time there was"


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[tuple[Gateway, openai.AsyncOpenAI, httpx.AsyncClient]]:
    async with (
        served_http(**settings) as (gateway, _),
        http_client(gateway.http_url) as plain,
        openai.DefaultAsyncHttpxClient(trust_env=False) as own,  # no proxy of the environment stands between
        openai.AsyncOpenAI(base_url=f"{gateway.http_url}/v1", api_key="none", http_client=own) as client,
    ):
        yield gateway, client, plain


async def over_grpc(gateway: Gateway, **request: Any) -> Answer:
    async with Client(gateway.address) as client:
        return await client.answer(build_request(**request), timeout_s=60)


async def test_greedy_answers_are_those_of_grpc_token_for_token() -> None:
    async with served() as (gateway, client, plain):
        model = (await client.models.list()).data[0].id
        assert (await client.models.retrieve(model)).id == model
        greedy: Any = {"model": model, "temperature": 0, "max_tokens": 24, "extra_body": {"return_token_ids": True}}
        expected = await over_grpc(gateway, chat=MESSAGES, sampling={"temperature": 0, "max_tokens": 24})
        whole: Any = await client.chat.completions.create(messages=MESSAGES, **greedy)
        assert whole.choices[0].token_ids == expected.token_ids
        assert whole.choices[0].message.content == expected.text
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
            expected.usage.prompt_tokens,
            expected.usage.output_tokens,
        )
        streamed = await client.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **greedy
        )
        chunks: list[Any] = [chunk async for chunk in streamed]
        told = [getattr(choice, "token_ids", None) or [] for chunk in chunks for choice in chunk.choices]
        assert [token for tokens in told for token in tokens] == expected.token_ids
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == expected.text
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
        tokens = (await plain.post("/tokenize", json={"messages": MESSAGES})).json()["tokens"]
        assert whole.prompt_token_ids == tokens and len(tokens) == whole.usage.prompt_tokens
        text = (await plain.post("/detokenize", json={"tokens": expected.token_ids})).json()["prompt"]
        assert text == expected.text


async def test_completions_of_texts_and_tokens_with_logprobs_and_echo() -> None:
    async with served() as (gateway, client, plain):
        model = (await client.models.list()).data[0].id
        greedy: Any = {"model": model, "temperature": 0, "max_tokens": 8}
        expected = await over_grpc(gateway, prompt=PROMPT, sampling={"temperature": 0, "max_tokens": 8})
        one = await client.completions.create(prompt=PROMPT, logprobs=3, **greedy)
        assert one.choices[0].text == expected.text
        logprobs = one.choices[0].logprobs
        assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
        assert logprobs.top_logprobs is not None and all(len(top) <= 3 for top in logprobs.top_logprobs)
        assert all(
            found == pytest.approx(max(top.values()))
            for found, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        )
        tokens = (await plain.post("/tokenize", json={"prompt": PROMPT})).json()["tokens"]
        several = await client.completions.create(prompt=[tokens, tokens[:5]], **greedy)
        assert [choice.index for choice in several.choices] == [0, 1]
        assert several.choices[0].text == expected.text
        assert several.usage is not None and several.usage.prompt_tokens == len(tokens) + 5
        echoed = await client.completions.create(prompt=[PROMPT, "The"], echo=True, **greedy)
        assert echoed.choices[0].text == PROMPT + expected.text
        assert echoed.choices[1].text.startswith("The")
        streamed = await client.completions.create(prompt=[PROMPT, "The"], echo=True, stream=True, **greedy)
        texts = {0: "", 1: ""}
        async for chunk in streamed:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert [texts[0], texts[1]] == [choice.text for choice in echoed.choices]


async def test_what_is_sent_is_what_the_document_says() -> None:
    """The answers are made as plain data; their models are strict about each key."""
    async with served() as (_, _, plain):
        fields = {"max_tokens": 4, "return_token_ids": True, "seed": -1, "user": "u", "stop": "\u2603"}
        chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **fields}
        ChatCompletion.model_validate_json((await plain.post("/v1/chat/completions", json=chat)).content, strict=True)
        text = {"prompt": PROMPT, "logprobs": 2, **fields}
        Completion.model_validate_json((await plain.post("/v1/completions", json=text)).content, strict=True)
        options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        for path, body, model in (
            ("/v1/chat/completions", chat, ChatChunk),
            ("/v1/completions", text, Completion),
        ):
            response = await plain.post(path, json={**body, **options}, headers={"x-isthmus-explain": "true"})
            *events, done, end = response.text.split("\n\n")
            assert (done, end) == ("data: [DONE]", "")
            chunks = [model.model_validate_json(event.removeprefix("data: "), strict=True) for event in events]
            assert all(chunk.usage is not None for chunk in chunks)
            assert chunks[-1].isthmus is not None


async def test_two_hundred_streams_that_are_left_hold_nothing() -> None:
    async with served_http(sign_of_life_s=0.5) as (gateway, pair):
        body = {"messages": MESSAGES, "max_tokens": 400, "stream": True, "ignore_eos": True}

        async def leave(number: int) -> None:
            async with http_client(gateway.http_url) as client:
                try:
                    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                        lines = response.aiter_lines()
                        for _ in range(number % 7):
                            await anext(lines, "")
                except httpx.HTTPError:
                    pass

        for start in range(0, 200, 20):
            await asyncio.gather(*(leave(number) for number in range(start, start + 20)))
        async with asyncio.timeout(20):
            await gateway.load.wait_idle()
        await pair.baseline()
        assert gateway.http is not None
        async with asyncio.timeout(5):
            while gateway.http.connections:
                await asyncio.sleep(0.05)


async def test_several_answers_biases_and_stops() -> None:
    async with served() as (gateway, client, plain):
        model = (await client.models.list()).data[0].id
        drawn: Any = {"model": model, "messages": MESSAGES, "max_tokens": 6, "temperature": 1, "seed": 3, "n": 3}
        whole: Any = await client.chat.completions.create(**drawn, extra_body={"return_token_ids": True})
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        assert whole.usage.completion_tokens == sum(len(choice.token_ids) for choice in whole.choices)
        for number, choice in enumerate(whole.choices):  # each is what a request with its seed gets
            sampling = {"temperature": 1, "seed": 3 + number, "max_tokens": 6}
            assert (await over_grpc(gateway, chat=MESSAGES, sampling=sampling)).token_ids == choice.token_ids
        texts = {0: "", 1: "", 2: ""}
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        usage = None
        async for chunk in await client.chat.completions.create(**drawn, **options):
            for piece in chunk.choices:
                texts[piece.index] += piece.delta.content or ""
            usage = chunk.usage
        assert list(texts.values()) == [choice.message.content for choice in whole.choices]
        assert usage == whole.usage
        token = (await plain.post("/tokenize", json={"prompt": "a"})).json()["tokens"][-1]
        biased: Any = await client.completions.create(
            model=model, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(token): 100}, logprobs=1
        )
        assert len(set(biased.choices[0].logprobs.tokens)) == 1
        stop = biased.choices[0].logprobs.tokens[0]
        stopped: Any = await client.completions.create(
            model=model, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(token): 100}, stop=[stop]
        )
        assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
        assert stopped.choices[0].stop_reason == stop


async def test_a_named_tool_is_a_matter_of_the_grammar_and_history_goes_through_the_template() -> None:
    async with served() as (_, client, plain):
        model = (await client.models.list()).data[0].id
        called = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "noon"}'}}
        history: Any = [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None, "annotations": []},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "blue"}]},
        ]
        tools: Any = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]
        answer = await client.chat.completions.create(model=model, messages=history, tools=tools, max_tokens=4)
        assert answer.choices[0].message.role == "assistant"
        without = await plain.post("/tokenize", json={"messages": MESSAGES})
        assert answer.usage is not None and answer.usage.prompt_tokens > without.json()["count"]
        with pytest.raises(openai.BadRequestError, match="tool_choice names 'sea'"):
            named: Any = {"type": "function", "function": {"name": "sea"}}
            await client.chat.completions.create(model=model, messages=history, tools=tools, tool_choice=named)


async def test_prompts_can_be_scored() -> None:
    """As lm-eval does it: token ids, echo, one token of output, of which nothing is looked at; or none at all."""
    async with served() as (gateway, client, plain):
        model = (await client.models.list()).data[0].id
        tokens = (await plain.post("/tokenize", json={"prompt": PROMPT})).json()["tokens"]
        scored: Any = {"model": model, "prompt": [tokens], "echo": True, "logprobs": 2, "temperature": 0}
        one = (await client.completions.create(max_tokens=1, **scored)).choices[0]
        logprobs = one.logprobs
        assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
        assert logprobs.text_offset is not None and logprobs.top_logprobs is not None
        assert len(logprobs.tokens) == len(tokens) + 1
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        assert all(logprob < 0 for logprob in logprobs.token_logprobs[1:])
        assert logprobs.text_offset[-1] == len(PROMPT)
        assert one.text.startswith(PROMPT)
        expected = await over_grpc(gateway, prompt=PROMPT, sampling={"max_tokens": 1, "prompt_logprobs": 2})
        assert logprobs.token_logprobs[1:-1] == [each.logprob for each in expected.prompt_logprobs]
        none = await client.completions.create(max_tokens=0, **scored)
        assert (none.choices[0].text, none.choices[0].finish_reason) == (PROMPT, "length")
        assert none.choices[0].logprobs is not None
        assert none.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:-1]
        assert none.usage is not None and none.usage.completion_tokens == 0
        chat: Any = {"model": model, "messages": MESSAGES, "max_tokens": 2, "prompt_logprobs": 1}
        for stream in (False, True):
            response = await plain.post("/v1/chat/completions", json={**chat, "stream": stream})
            first = response.text.partition("\n\n")[0].removeprefix("data: ")
            found = (ChatChunk if stream else ChatCompletion).model_validate_json(first).prompt_logprobs
            assert found is not None and found[0] is None and len(found) > len(tokens)
            assert all(each is not None and 1 <= len(each) <= 2 for each in found[1:])
