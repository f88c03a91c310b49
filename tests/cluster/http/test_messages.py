"""`/v1/messages` of a gateway whose workers follow a script: what is refused and how, and how streams are told."""

import asyncio
import json
from pathlib import Path
from typing import Any

import anthropic
import grpc.aio
import httpx
import pytest
from http_door import http_cluster
from keyed import Keys
from scripted import Script, hangs, says

from isthmus.cluster.access.settings import AccessSettings
from isthmus.cluster.http.anthropic.blocks import Blocks
from isthmus.cluster.text.answer_parser import Delta
from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.errors import Exhausted, Expired, Unavailable

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
PATH = "/v1/messages"
FORCED: dict[str, Any] = {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}}


def raises(error: Exception) -> Script:
    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        raise error

    return script


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    body = response.json()
    assert set(body) == {"type", "error"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert response.headers["request-id"] == response.headers["x-request-id"]
    return response.status_code, body["error"]["type"], body["error"]["message"]


def events_of(text: str) -> list[dict[str, Any]]:
    events = [event.partition("\ndata: ") for event in text.split("\n\n")[:-1]]
    assert all(name == f"event: {json.loads(data)['type']}" for name, _, data in events)
    return [json.loads(data) for _, _, data in events]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Exhausted("no pages"), 429, "rate_limit_error"),
        (Unavailable("draining"), 503, "overloaded_error"),
        (Expired("too late"), 504, "timeout_error"),
        (KeyError("secret"), 500, "api_error"),
    ],
)
async def test_each_error_has_its_status_and_type(error: Exception, status: int, kind: str, stream: bool) -> None:
    async with http_cluster(raises(error), replays=0) as (_, client):
        response = await client.post(PATH, json={**BODY, "stream": stream})
        assert error_of(response)[:2] == (status, kind)
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status == 429)


async def test_what_cannot_be_asked_is_refused_by_its_name() -> None:
    def said(*blocks: Any, role: str = "user") -> dict[str, Any]:
        return {"messages": [*BODY["messages"], {"role": role, "content": list(blocks)}]}

    image = {"type": "image", "source": {"type": "url", "url": "x"}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [image]}
    async with http_cluster(says("hello"), http={"max_body_bytes": 4096}) as (cluster, client):
        for fields, word in (
            ({"max_tokens": None}, "max_tokens"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"nonsense": 1}, "nonsense is not a field"),
            ({"container": "c"}, "container is not supported"),
            (said(image), "messages.1.content.0: type 'image' is not supported"),
            (said({"type": "document"}), "type 'document' is not supported"),
            (said(result), "content.0.content.0: type 'image'"),
            (said({"type": "thinking", "thinking": "x"}), "a thinking block in a message of role user"),
            (said({"type": "text"}), "messages.1.content.0.text is missing"),
            (said({"type": "tool_use", "id": "a", "name": "f", "input": "x"}, role="assistant"), "content.0.input"),
            ({"stop_sequences": [""]}, "stop_sequences.0"),
            ({"tool_choice": {"type": "tool"}}, "name goes with type tool"),
            ({"tool_choice": {"type": "any"}}, "tool"),
            ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "budget_tokens is not below max_tokens"),
            ({"temperature": "1"}, "temperature"),
            ({**FORCED, "output_config": {"format": {"type": "json_schema", "schema": {}}}}, "tool_choice and another"),
        ):
            status, kind, message = error_of(await client.post(PATH, json={**BODY, **fields}))
            assert (status, kind) == (400, "invalid_request_error"), fields
            assert word in message, message
        assert error_of(await client.post(PATH, json={**BODY, "model": "gpt-5"}))[:2] == (404, "not_found_error")
        assert error_of(await client.get(f"{PATH}/batches"))[:2] == (404, "not_found_error")
        assert error_of(await client.get(PATH))[:2] == (405, "invalid_request_error")
        large = {**BODY, "system": "x" * 5000}
        assert error_of(await client.post(PATH, json=large))[:2] == (413, "request_too_large")
        headers = {"x-request-id": "x" * 129}
        assert (await client.post(PATH, json=BODY, headers=headers)).json()["error"]["type"] == "invalid_request_error"
        assert set((await client.get("/v1/messages2")).json()) == {"error"}
        assert not cluster.decodes[0].requests


async def test_keys_are_asked_for_and_limits_told(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    key = keys.add("acme", requests_per_min=1)
    async with (
        http_cluster(says("hello"), access=AccessSettings(keys_file=str(keys.path))) as (cluster, client),
        anthropic.DefaultAsyncHttpxClient(trust_env=False) as http,
    ):
        assert error_of(await client.post(PATH, json=BODY))[:2] == (401, "authentication_error")
        own: Any = {"base_url": cluster.gateway.http_url, "api_key": key, "http_client": http, "max_retries": 0}
        asking = anthropic.AsyncAnthropic(**own)
        asked: Any = {"model": "", **BODY}
        answered = await asking.messages.with_raw_response.create(**asked)
        assert (await answered.parse()).to_dict()["content"] == [{"type": "text", "text": "hello"}]
        assert answered.headers["anthropic-ratelimit-requests-limit"] == "1"
        assert answered.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert answered.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
        with pytest.raises(anthropic.RateLimitError) as caught:
            await asking.messages.create(**asked)
        assert caught.value.request_id
        assert 55 <= int(caught.value.response.headers["retry-after"]) <= 61
        headers = {"authorization": f"Bearer {key}", "x-isthmus-tenant": "other"}
        assert error_of(await client.post(PATH, json=BODY, headers=headers))[:2] == (403, "permission_error")


async def test_a_stream_says_that_it_lives_and_how_it_has_failed() -> None:
    async def silent(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await asyncio.sleep(0.3)
        await hangs(request, context)

    async with http_cluster(silent, sign_of_life_s=0.05) as (_, client):
        headers = {"x-request-timeout": "0.8"}
        response = await client.post(PATH, json={**BODY, "stream": True}, headers=headers)
        events = events_of(response.text)
        assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
        assert events[0]["message"]["usage"]["input_tokens"] == len("<user>hi")
        assert {"type": "text_delta", "text": "A"} in [event.get("delta") for event in events]
        assert events[-1]["error"]["type"] == "timeout_error"


def test_pieces_are_put_into_the_blocks_that_they_belong_to() -> None:
    deltas = [
        Delta(reasoning="let me "),
        Delta(reasoning="see"),
        Delta(content="Well"),
        Delta(tool_index=0, tool_id="x", tool_name="f"),
        Delta(tool_index=0, tool_arguments='{"a"'),
        Delta(tool_index=0, tool_arguments=': "b'),
        Delta(content="!"),
    ]
    for thinking in (True, False):
        made = list[Any]()
        for block, begins, piece in Blocks(thinking=thinking, parallel=True).place(deltas):
            made += [block] if begins else []
            block.pieces.append(piece)
        assert [block.whole() for block in made] == [
            *([{"type": "thinking", "thinking": "let me see", "signature": ""}] if thinking else []),
            {"type": "text", "text": "Well"},
            {"type": "tool_use", "id": "x", "name": "f", "input": {}},
            {"type": "text", "text": "!"},
        ]
