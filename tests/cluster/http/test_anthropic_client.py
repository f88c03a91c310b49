"""Anthropic's own client, unprepared, and a small model: what it gets is what gRPC gives, and what its types say."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import httpx
import pytest
from http_door import http_client, http_cluster
from scripted import says
from served_http import TEMPLATE, chat_model, served_http

from isthmus.cluster.client.client import Answer, Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.http.anthropic.schema.responses import MessageEvent, MessageTold, TokensCounted

SYSTEM = "Be brief."
QUESTION: Any = [{"role": "user", "content": "Why is the sky blue?"}]
CHAT: Any = [{"role": "system", "content": SYSTEM}, *QUESTION]
GREEDY = {"temperature": 0}  # the newest clients have no parameter for it
SKY: Any = {
    "name": "sky",
    "description": "Its colour",
    "input_schema": {
        "type": "object",
        "properties": {"at": {"enum": ["noon", "night"]}},
        "required": ["at"],
        "additionalProperties": False,
    },
}
ARGUMENTS = {"a": 1, "b": "c"}
CALLS = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "c"}}\n</tool_call>\n' * 2
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
FORCED: dict[str, Any] = {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}}
THOUGHT = "{% if message.reasoning %}<think>{{ message.reasoning }}</think>{% endif %}"
THINKS = TEMPLATE.replace("{{ message.content", THOUGHT + "{{ message.content").replace(
    "<assistant>", "<assistant>{% if enable_thinking is not false %}<think>{% endif %}"
)


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[tuple[Gateway, anthropic.AsyncAnthropic, httpx.AsyncClient]]:
    async with (
        served_http(**settings) as (gateway, _),
        http_client(gateway.http_url) as plain,
        anthropic.DefaultAsyncHttpxClient(trust_env=False) as own,  # no proxy of the environment stands between
        anthropic.AsyncAnthropic(base_url=gateway.http_url, api_key="none", http_client=own, max_retries=0) as client,
    ):
        yield gateway, client, plain


async def over_grpc(gateway: Gateway, **request: Any) -> Answer:
    async with Client(gateway.address) as client:
        return await client.answer(build_request(**request), timeout_s=60)


async def test_greedy_answers_are_those_of_grpc() -> None:
    async with served() as (gateway, client, plain):
        model = (await client.models.list()).data[0].id
        expected = await over_grpc(gateway, chat=CHAT, sampling={"temperature": 0, "max_tokens": 24})
        asked: Any = {
            "model": model,
            "max_tokens": 24,
            "system": [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}],
            "messages": QUESTION,
            "extra_body": GREEDY,
            "metadata": {"user_id": "u"},
        }
        whole = await client.messages.create(**asked)
        assert [block.to_dict() for block in whole.content] == [{"type": "text", "text": expected.text}]
        assert (whole.stop_reason, whole.stop_sequence, whole.model) == ("max_tokens", None, model)
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (expected.usage.prompt_tokens, 24)
        assert whole._request_id and whole.id == f"msg_{whole._request_id}"  # pyright: ignore[reportPrivateUsage]
        async with client.messages.stream(**asked) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            streamed = await stream.get_final_message()
        assert text == expected.text
        told, again = (each.to_dict(exclude_none=True) for each in (whole, streamed))
        assert told | {"id": ""} == again | {"id": ""}
        del asked["extra_body"], asked["metadata"], asked["max_tokens"]
        counted = await client.messages.count_tokens(**asked)
        assert counted.input_tokens == whole.usage.input_tokens
        tokens = (await plain.post("/tokenize", json={"messages": CHAT})).json()["count"]
        assert counted.input_tokens == tokens


async def test_stop_sequences_and_prefilled_answers() -> None:
    async with served() as (gateway, client, _):
        greedy: Any = {"model": "", "max_tokens": 24, "extra_body": GREEDY}
        expected = await over_grpc(gateway, chat=QUESTION, sampling={"temperature": 0, "max_tokens": 24})
        stop = expected.text[len(expected.text) // 2 :][:3]
        stopped = await client.messages.create(messages=QUESTION, stop_sequences=["\u2603", stop], **greedy)
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
        text = expected.text[: expected.text.index(stop)]
        assert "".join(block.text for block in stopped.content if block.type == "text") == text
        begun: Any = [*QUESTION, {"role": "assistant", "content": "Because"}]
        sampling = {"temperature": 0, "max_tokens": 24}
        expected = await over_grpc(gateway, chat=begun, sampling=sampling, continue_final_message=True)
        went_on = await client.messages.create(messages=begun, **greedy)
        assert [block.to_dict() for block in went_on.content] == [{"type": "text", "text": expected.text}]


async def test_a_tool_is_called_where_it_must_be_and_what_it_answers_is_read() -> None:
    async with served() as (_, client, _):
        asked: Any = {
            "model": "",
            "max_tokens": 200,
            "extra_body": GREEDY,
            "tools": [SKY, {**SKY, "name": "sea"}],
            "messages": QUESTION,
        }
        choice: Any
        for choice, most in (
            ({"type": "tool", "name": "sky"}, 1),
            ({"type": "any", "disable_parallel_tool_use": True}, 1),
            ({"type": "any"}, 16),
        ):
            whole = await client.messages.create(tool_choice=choice, **asked)
            assert whole.stop_reason == "tool_use"
            assert 1 <= len(whole.content) <= most
            async with client.messages.stream(tool_choice=choice, **asked) as stream:
                streamed = await stream.get_final_message()
            blocks: list[tuple[Any, Any]] = list(zip(whole.content, streamed.content, strict=True))
            for found, again in blocks:
                assert found.type == again.type == "tool_use"
                assert (found.name, found.input) == (again.name, again.input)
                assert found.input in ({"at": "noon"}, {"at": "night"})
                assert found.name == "sky" or most > 1 or choice["type"] == "any"
        call: Any = whole.content[0]
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "blue"}]}
        history: Any = [
            *QUESTION,
            {"role": "assistant", "content": whole.content[:1]},
            {"role": "user", "content": [result, {"type": "text", "text": "And at night?"}]},
        ]
        counted = await client.messages.count_tokens(model="", messages=history, tools=asked["tools"])
        answer = await client.messages.create(**{**asked, "messages": history, "max_tokens": 4})
        assert answer.usage.input_tokens == counted.input_tokens > whole.usage.input_tokens
        none: Any = {"type": "none"}
        without = await client.messages.count_tokens(
            model="", messages=QUESTION, tools=asked["tools"], tool_choice=none
        )
        assert without == await client.messages.count_tokens(model="", messages=QUESTION)
        for wrong, words in (
            ({"tool_choice": {"type": "tool", "name": "air"}}, "tool_choice names 'air'"),
            ({"messages": history[:2]}, "messages end with tool_use"),
            ({"messages": history[2:]}, "tool_use_id is of no tool_use before"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ):
            with pytest.raises(anthropic.BadRequestError, match=words):
                await client.messages.create(**{**asked, **wrong})


async def test_thinking_is_told_unless_it_is_not_wanted() -> None:
    async with served(model=chat_model(THINKS, "tiny-llama-thinking")) as (gateway, client, _):
        greedy: Any = {"model": "", "max_tokens": 1200, "extra_body": GREEDY, "messages": QUESTION}
        for sent, kinds in (({"type": "adaptive"}, ["thinking"]), ({"type": "adaptive", "display": "omitted"}, [])):
            whole = await client.messages.create(**{**greedy, "max_tokens": 24, "thinking": sent})
            assert [block.type for block in whole.content] == kinds
            async with client.messages.stream(**{**greedy, "max_tokens": 24, "thinking": sent}) as stream:
                assert (await stream.get_final_message()).content == whole.content
            for block in whole.content:
                expected = await over_grpc(gateway, chat=QUESTION, sampling={"temperature": 0, "max_tokens": 24})
                assert block.type == "thinking" and block.thinking.strip() == expected.text.strip()
        answer = await client.messages.create(**{**greedy, "max_tokens": 24, "thinking": {"type": "disabled"}})
        assert [block.type for block in answer.content] == ["text"]
        with pytest.raises(anthropic.BadRequestError, match="thinking is enabled and a call required"):
            enabled: Any = {"type": "enabled", "budget_tokens": 1024}
            await client.messages.create(**greedy, thinking=enabled, tools=[SKY], tool_choice={"type": "any"})


async def test_what_is_sent_is_what_the_document_says() -> None:
    """The answers are made as plain data; their models are strict about each key."""
    async with served() as (_, _, plain):
        explain = {"x-isthmus-explain": "true", "anthropic-version": "2023-06-01"}
        asked: Any = {"messages": QUESTION, "max_tokens": 60, "tools": [SKY], "top_k": 3, "top_p": 0.9}
        for choice in ("auto", "any"):
            body: Any = {**asked, "tool_choice": {"type": choice}}
            whole = await plain.post("/v1/messages", json=body, headers=explain)
            told = MessageTold.model_validate_json(whole.content, strict=True)
            assert told.isthmus is not None and told.isthmus["candidates"]
            response = await plain.post("/v1/messages", json={**body, "stream": True}, headers=explain)
            *events, end = response.text.split("\n\n")
            assert end == ""
            names = list[str]()
            for event in events:
                name, _, data = event.partition("\ndata: ")
                names.append(MessageEvent.model_validate_json(data, strict=True).root.type)
                assert name == f"event: {names[-1]}"
            assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
            assert names.count("content_block_start") == names.count("content_block_stop") >= 1
        count = await plain.post("/v1/messages/count_tokens", json={"messages": QUESTION})
        TokensCounted.model_validate_json(count.content, strict=True)


def json_events(text: str) -> list[dict[str, Any]]:
    return [json.loads(event.partition("\ndata: ")[2]) for event in text.split("\n\n")[:-1]]


@pytest.mark.parametrize("parallel", [False, True])
async def test_calls_are_blocks_of_their_own(parallel: bool) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": not parallel}
    body: dict[str, Any] = {**BODY, **FORCED, "tool_choice": choice, "max_tokens": 500}
    async with http_cluster(says(CALLS, size=7)) as (_, client):
        calls = 2 if parallel else 1
        whole = (await client.post("/v1/messages", json=body)).json()
        assert [(block["name"], block["input"]) for block in whole["content"]] == [("f", ARGUMENTS)] * calls
        assert len({block["id"] for block in whole["content"]}) == calls
        events = json_events((await client.post("/v1/messages", json={**body, "stream": True})).text)
        pieces = [event for event in events if event["type"] == "content_block_delta"]
        for index in range(calls):
            own = [event["delta"]["partial_json"] for event in pieces if event["index"] == index]
            assert json.loads("".join(own)) == ARGUMENTS
        opened = [event["index"] for event in events if event["type"] == "content_block_start"]
        assert opened == list(range(calls)) == [event["index"] for event in events if "block_stop" in event["type"]]
    async with http_cluster(says(CALLS[: CALLS.index('"c"')])) as (_, client):  # ends inside of the arguments
        cut = (await client.post("/v1/messages", json=body)).json()
        assert (cut["content"][0]["input"], cut["stop_reason"]) == ({"a": 1}, "max_tokens")
