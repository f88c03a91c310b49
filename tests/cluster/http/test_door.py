"""The HTTP port of a gateway whose workers follow a script: what is let in, what is refused and how, what ends."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from http_door import http_client, http_cluster
from keyed import Keys
from scripted import Script, ScriptedCluster, hangs, says, scripted_cluster, served

from isthmus.cluster.access.settings import AccessSettings
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.http import connection, sse
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.errors import Exhausted, Expired, InvalidRequest, Unavailable

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
CHATS = "/v1/chat/completions"


def raises(error: Exception) -> Script:
    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        raise error

    return script


async def idle(cluster: ScriptedCluster) -> None:
    async with asyncio.timeout(5):
        await cluster.gateway.load.wait_idle()


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("too odd"), 400, "invalid_value"),
        (Exhausted("no pages"), 429, "rate_limit_exceeded"),
        (Unavailable("draining"), 503, "unavailable"),
        (Expired("too late"), 504, "deadline_exceeded"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_each_error_has_its_status(error: Exception, status: int, code: str, stream: bool) -> None:
    """Before the first event of a stream too: nothing is promised by a status that is not known yet."""
    async with http_cluster(raises(error), replays=0) as (cluster, client):
        response = await client.post(CHATS, json={**CHAT, "stream": stream})
        told = error_of(response)
        assert (response.status_code, told["code"]) == (status, code)
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status == 429)
        if status == 429:
            assert 100 <= int(response.headers["retry-after-ms"]) <= 10_000
        await idle(cluster)


async def test_what_cannot_be_asked_is_refused_by_its_name() -> None:
    async with http_cluster(says("hello")) as (_, client):
        for fields, param in (
            ({"store": True}, "store"),
            ({"audio": {"voice": "x"}}, "audio"),
            ({"modalities": ["text", "audio"]}, "modalities.1"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
            ({"Nonsense": 1}, "Nonsense"),
            ({"temperature": -1}, "temperature"),
            ({"temperature": "1"}, "temperature"),
            ({"n": 65}, "n"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"stop": ["", ""]}, "stop.0"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"stream_options": {"include_usage": True}}, None),
            ({"response_format": {"type": "json_schema"}}, "response_format"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
            ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
            ({"min_tokens": 6}, "min_tokens"),
            ({"codec": "zip"}, "codec"),
        ):
            response = await client.post(CHATS, json={**CHAT, **fields})
            told = error_of(response)
            assert response.status_code == (404 if "codec" in fields else 400), fields
            assert told["type"] == "invalid_request_error"
            if param is not None and "codec" not in fields:
                assert told["param"] == param
        response = await client.post(CHATS, json={**CHAT, "model": "gpt-5"})
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
        assert (await client.get("/v2")).status_code == 404
        assert (await client.get(CHATS)).status_code == 405


async def test_unknown_fields_are_ignored_where_the_settings_say_so() -> None:
    async with http_cluster(says("hello"), http={"strict_fields": False}) as (_, client):
        response = await client.post(CHATS, json={**CHAT, "nonsense": 1, "messages": [{**CHAT["messages"][0], "x": 2}]})
        assert response.json()["choices"][0]["message"]["content"] == "hello"
        assert (await client.post(CHATS, json={**CHAT, "store": True})).status_code == 400


async def test_bodies_are_bounded_in_size_time_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cluster.http.body.REQUEST_S", 0.2)
    async with http_cluster(says("hello"), http={"max_body_bytes": 1024}) as (cluster, client):
        large = json.dumps({**CHAT, "user": "x" * 2000}).encode()
        kind = {"content-type": "application/json"}
        assert (await client.post(CHATS, content=large, headers=kind)).status_code == 413

        async def chunked() -> AsyncIterator[bytes]:
            for start in range(0, len(large), 100):
                yield large[start : start + 100]

        assert (await client.post(CHATS, content=chunked(), headers=kind)).status_code == 413

        async def slow() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(1)

        assert (await client.post(CHATS, content=slow(), headers=kind)).status_code == 504
        for wrong in ({}, {"content-type": "text/plain"}, {**kind, "content-encoding": "gzip"}):
            assert (await client.post(CHATS, content=json.dumps(CHAT), headers=wrong)).status_code == 400
        for broken in (b"", b"{", b'{"messages": "\\ud800"}', b"[" * 1000, b'"\xff"', b"null", b"[]", b"NaN"):
            assert (await client.post(CHATS, content=broken, headers=kind)).status_code == 400, broken
        assert cluster.gateway.load.active == 0


async def test_ids_come_back_and_timings_where_asked_for() -> None:
    async with http_cluster(says("hello")) as (cluster, client):
        headers = {"x-request-id": "my-own", "x-isthmus-explain": "true", "traceparent": "00-1-2-01"}
        response = await client.post(CHATS, json={**CHAT, "codec": "raw"}, headers=headers)
        assert response.headers["x-request-id"] == "my-own"
        assert response.json()["id"] == "chatcmpl-my-own"
        assert response.json()["isthmus"]["candidates"]
        assert cluster.decodes[0].requests[0].codec == "raw"
        assert len((await client.get("/v1/models")).headers["x-request-id"]) == 24
        assert (await client.get("/v1/models", headers={"x-request-id": "x" * 129})).status_code == 400
        assert (await client.post(CHATS, json=CHAT, headers={"x-isthmus-explain": "maybe"})).status_code == 400


async def test_a_deadline_ends_a_request_everywhere() -> None:
    async with http_cluster(hangs) as (cluster, client):
        response = await client.post(CHATS, json=CHAT, headers={"x-request-timeout": "0.2"})
        assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
        async with client.stream(
            "POST", CHATS, json={**CHAT, "stream": True}, headers={"x-request-timeout": "0.3"}
        ) as streamed:
            assert streamed.status_code == 200
            text = (await streamed.aread()).decode()
        event = text.rpartition("event: error\ndata: ")[2]
        assert json.loads(event)["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in text
        for wrong in ("0", "-1", "nan", "1e99", "soon"):
            assert (await client.post(CHATS, json=CHAT, headers={"x-request-timeout": wrong})).status_code == 400
        await idle(cluster)
        assert cluster.decodes[0].cancelled == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_frees_everything(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "isthmus")
    async with http_cluster(hangs) as (cluster, _):
        for _ in range(20):
            async with http_client(cluster.gateway.http_url) as client:
                asking = asyncio.create_task(client.post(CHATS, json={**CHAT, "stream": stream}))
                async with asyncio.timeout(5):
                    while not cluster.gateway.load.active:
                        await asyncio.sleep(0.005)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            await idle(cluster)
        async with asyncio.timeout(5):
            while cluster.decodes[0].cancelled < len(cluster.decodes[0].requests):
                await asyncio.sleep(0.01)
        ended = [vars(each)["fields"] for each in caplog.records if each.getMessage() == "answered over HTTP"]
        assert [each["status"] for each in ended] == [499] * 20
        assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


async def test_a_stream_that_is_silent_says_that_it_lives() -> None:
    go = asyncio.Event()

    async def silent(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await go.wait()
        await says("hello")(request, context)

    async with (
        http_cluster(silent, sign_of_life_s=0.05) as (_, client),
        client.stream("POST", CHATS, json={**CHAT, "stream": True}) as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == sse.COMMENT.decode().strip()
        go.set()
        rest = [line async for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"


async def test_a_reader_that_stalls_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sse, "STALL_S", 0.3)

    async def floods(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(DecodeEvent(token_ids=[65]))

    async with http_cluster(floods) as (cluster, client):
        assert cluster.gateway.http_url is not None
        port = int(cluster.gateway.http_url.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        # What the kernel takes for a reader is some answers; so it asks for many, one after the other, and reads none.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({**CHAT, "stream": True, "max_tokens": 900, "logprobs": True}).encode()
        head = f"POST {CHATS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        for _ in range(200):
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(30):
            while not [each for each in caplog.records if "nothing was read from this stream" in each.getMessage()]:
                await asyncio.sleep(0.02)
        await idle(cluster)
        async with asyncio.timeout(5):
            while cluster.decodes[0].cancelled < 1:
                await asyncio.sleep(0.01)
        writer.close()
        assert (await client.get("/health")).status_code == 200


async def test_a_drain_lets_streams_finish_and_refuses_new_requests() -> None:
    go = asyncio.Event()

    async def slow(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await context.write(DecodeEvent(token_ids=[65]))
        await go.wait()
        await says("hello")(request, context)

    async with (
        http_cluster(slow) as (cluster, client),
        client.stream("POST", CHATS, json={**CHAT, "max_tokens": 6, "stream": True}) as streamed,
    ):
        lines = streamed.aiter_lines()
        await anext(lines)
        assert (await client.get("/ready")).status_code == 200
        draining = asyncio.create_task(cluster.gateway.drain(10))
        async with asyncio.timeout(5):
            while (await client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.01)
        refused = await client.post(CHATS, json=CHAT)
        assert (refused.status_code, error_of(refused)["message"]) == (503, "the gateway is shutting down")
        assert (await client.get("/health")).status_code == 200
        go.set()
        assert [line async for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"
        assert await draining


async def test_a_stop_ends_streams_with_a_word() -> None:
    async with (
        scripted_cluster(hangs, http_listen="127.0.0.1:0") as cluster,
        http_client(cluster.gateway.http_url) as client,
        client.stream("POST", CHATS, json={**CHAT, "stream": True}) as streamed,
    ):
        lines = streamed.aiter_lines()
        await anext(lines)
        stopping = asyncio.create_task(cluster.gateway.stop())
        seen = list[str]()
        with pytest.raises(httpx.RemoteProtocolError):  # it is not a whole answer
            seen.extend([line async for line in lines if not seen.append(line)])
        assert any('"the gateway stops"' in line for line in seen)
        await stopping


async def test_keys_are_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "isthmus.audit")
    keys = Keys(tmp_path / "keys.json")
    key, other = keys.add("acme", requests_per_min=2, max_priority="standard"), keys.add("other")
    async with http_cluster(says("hello"), access=AccessSettings(keys_file=str(keys.path))) as (_, client):
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {key}"}, {"x-api-key": "no"}):
            for path in ("/v1/models", "/openapi.json", "/nothing"):
                response = await client.get(path, headers=headers)
                assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        both = {"authorization": f"Bearer {key}", "x-api-key": other}
        assert (await client.get("/v1/models", headers=both)).status_code == 401
        assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 200
        for headers in ({"authorization": f"Bearer {other}"}, {"x-api-key": other}, {**both, "x-api-key": key}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        own = {"authorization": f"Bearer {key}"}
        denied = await client.post(CHATS, json={**CHAT, "priority": "interactive"}, headers=own)
        assert (denied.status_code, error_of(denied)["code"]) == (403, "permission_denied")
        assert (await client.post(CHATS, json=CHAT, headers={**own, "x-isthmus-tenant": "other"})).status_code == 403
        answered = [await client.post(CHATS, json=CHAT, headers=own) for _ in range(3)]
        assert [each.status_code for each in answered] == [200, 200, 429]
        assert [each.headers["x-ratelimit-remaining-requests"] for each in answered] == ["1", "0", "0"]
        assert answered[2].headers["x-ratelimit-limit-requests"] == "2"
        assert 25 <= int(answered[2].headers["retry-after"]) <= 31
    audited = [vars(each)["fields"] for each in caplog.records if each.name == "isthmus.audit"]
    assert audited[0]["what"] == "GET /v1/models"
    assert audited[0]["who"] == "127.0.0.1"
    assert key not in json.dumps(audited)


async def test_pages_of_other_sites_are_kept_out() -> None:
    """A browser is made to ask by any page that it shows, and a page can give this address a name of its own."""
    async with http_cluster(says("hello"), http={"cors_origins": ("https://app.example",)}) as (cluster, client):
        own = cluster.gateway.http_url
        assert own is not None
        for headers, status in (
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"host": "evil.example"}, 403),
            ({"host": "127.0.0.1.evil.example:80"}, 403),
            ({"origin": own}, 200),
            ({"host": "localhost:1234"}, 200),
            ({"origin": "https://app.example"}, 200),
        ):
            assert (await client.get("/v1/models", headers=headers)).status_code == status, headers
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,x-stainless-os",
        }
        allowed = await client.options(CHATS, headers={"origin": "https://app.example", **asked})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]  # what clients add of their own
        refused = await client.options(CHATS, headers={"origin": "https://evil.example", **asked})
        assert "access-control-allow-origin" not in refused.headers


async def test_slow_headers_and_what_is_no_http_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.3)
    async with http_cluster(says("hello")) as (cluster, _):
        assert cluster.gateway.http_url is not None
        port = int(cluster.gateway.http_url.rpartition(":")[2])

        async def said(*pieces: bytes, pause_s: float = 0.0) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for piece in pieces:
                    writer.write(piece)
                    await asyncio.sleep(pause_s)
                return await asyncio.wait_for(reader.read(), 5)
            except ConnectionError:
                return b""
            finally:
                writer.close()

        assert await said() == b""
        assert await said(b"GET /health HTTP/1.1\r\n", *([b"x: y\r\n"] * 10), pause_s=0.1) == b""
        whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        assert (await said(whole, b"GET /he")).count(b"200 OK") == 1  # the second one never ends
        assert b'"code": "not_http"' in await said(b"\x16\x03\x01 nonsense\r\n\r\n")
        large = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx: " + b"y" * 20_000 + b"\r\n\r\n"
        for pieces in ((large,), (large[:17_000], large[17_000:])):  # all at once, and in two
            answer = await said(*pieces, pause_s=0.05)
            assert b" 400 " in answer
            assert b"at most 16384" in answer
        both = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
        answer = await said(both + b"0\r\n\r\n" + whole)
        assert b"content-length and transfer-encoding" in answer
        assert answer.count(b"HTTP/1.1 ") == 1  # and what stands behind is no request


async def test_a_probe_hears_of_a_drain_where_keys_are_asked_for(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    keys.add("acme")
    async with http_cluster(says("hello"), access=AccessSettings(keys_file=str(keys.path))) as (cluster, client):
        await cluster.gateway.drain(0)
        response = await client.get("/ready")
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")


async def test_names_in_headers_are_named_where_they_cannot_be() -> None:
    async with http_cluster(says("hello")) as (_, client):
        for header in ("x-request-id", "x-isthmus-tenant"):
            for value in (b"x" * 129, "\u00e4".encode()):
                response = await client.post(CHATS, json=CHAT, headers=[(header.encode(), value)])
                assert (response.status_code, error_of(response)["param"]) == (400, header)


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "connection_limit", lambda: 2)
    async with http_cluster(says("hello")) as (cluster, _):
        clients = [http_client(cluster.gateway.http_url) for _ in range(3)]
        statuses = [(await each.get("/health")).status_code for each in clients]
        assert statuses == [200, 200, 503]
        await asyncio.gather(*(each.aclose() for each in clients))
        async with asyncio.timeout(5):
            while cluster.gateway.http is None or cluster.gateway.http.connections:
                await asyncio.sleep(0.01)


async def test_addresses_that_others_reach_need_keys_and_certificates() -> None:
    anonymous = AccessSettings(anonymous=True)
    for config, words in (
        (GatewayConfig(http_listen="0.0.0.0:0"), "no API keys"),
        (GatewayConfig(http_listen="0.0.0.0:0", access=anonymous), "can be reached by others"),
        (GatewayConfig(http_listen="127.0.0.1:0", http={"tls": "on"}), "no certificates"),  # pyright: ignore
    ):
        gateway = Gateway("127.0.0.1:0", served(), config=config)
        with pytest.raises(InvalidRequest, match=words):
            await gateway.start()
        await gateway.stop()


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        gateway = Gateway("127.0.0.1:0", served(), config=GatewayConfig(http_listen=f"127.0.0.1:{port}"))
        with pytest.raises(OSError, match=r"cannot listen on .* in use \(from gateway.http_listen"):
            await gateway.start()
        await gateway.stop()
