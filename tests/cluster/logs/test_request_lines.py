"""One line at the end of each request, without what was asked and answered."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from scripted import ScriptedCluster, hangs, says, scripted_cluster, served

from isthmus.cluster.access.key_file import KeyDocument, change
from isthmus.cluster.access.keys import new_key
from isthmus.cluster.access.settings import AccessSettings, Limits
from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.proto.generation_pb2 import GenerateRequest

PROMPT = "the-secret-prompt"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The fields of the lines of requests so far."""
    caplog.set_level(logging.DEBUG, "isthmus")
    return lambda: [vars(entry)["fields"] for entry in caplog.records if entry.getMessage() == "request ended"]


def asked(prompt: str = PROMPT, **fields: Any) -> GenerateRequest:
    request = build_request(prompt=prompt, codec="raw", sampling={"max_tokens": 5, "seed": 1})
    request.MergeFrom(GenerateRequest(request_id="mine", **fields))
    return request


async def ask(cluster: ScriptedCluster, request: GenerateRequest, key: str | None = None) -> str:
    async with Client(cluster.gateway.address, api_key=key) as client:
        return (await client.answer(request, timeout_s=10)).text


async def test_a_request_that_is_answered(lines: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with scripted_cluster(says("the-secret-answer", size=3)) as cluster:
        request = asked(tenant="acme")
        request.sampling.max_tokens = 17
        assert await ask(cluster, request) == "the-secret-answer"
        (line,) = lines()
        assert line.pop("ms") > 0
        assert line == {
            "request_id": "mine",
            "tenant": "acme",
            "model": "bytes",
            "codec": "raw",
            "status": "OK",
            "prompt_tokens": 17,
            "output_tokens": 17,
            "decode_worker": cluster.decodes[0].address,
            "replays": 0,
        }
    assert "the-secret" not in "\n".join(f"{entry.getMessage()} {vars(entry)}" for entry in caplog.records)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (asked(""), "INVALID_ARGUMENT"),
        (asked(model=PROMPT), "NOT_FOUND"),
        (asked(tenant="t" * 129), "INVALID_ARGUMENT"),
        (build_request(chat=[{"role": PROMPT, "content": PROMPT}]), "INVALID_ARGUMENT"),
    ],
)
async def test_a_request_that_is_refused(
    lines: Any, request_: GenerateRequest, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a caller is told of its mistake may be its own words."""
    async with scripted_cluster(says("x")) as cluster:
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(cluster, request_)
        (line,) = lines()
        assert (line["status"], line["output_tokens"], "why" in line) == (status, 0, False)
    assert PROMPT not in "\n".join(str(vars(entry)) for entry in caplog.records)


async def test_a_request_over_a_limit_and_one_as_another_tenant(lines: Any, tmp_path: Path) -> None:
    key, record = new_key("acme", limits=Limits(requests_per_min=1))
    change(tmp_path / "keys.json", lambda _: KeyDocument(keys=(record,)))
    access = AccessSettings(keys_file=str(tmp_path / "keys.json"))
    async with scripted_cluster(says("hello"), access=access) as cluster:
        await ask(cluster, asked(), key)
        for request in (asked(), asked(tenant="other")):
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(cluster, request, key)
        ends = [(line["status"], line["tenant"], line.get("why")) for line in lines()]
        assert ends == [
            ("OK", "acme", None),
            ("RESOURCE_EXHAUSTED", "acme", "more than 1 requests a minute: try again later"),
            ("PERMISSION_DENIED", "other", None),
        ]


async def test_a_client_that_goes_away(lines: Any) -> None:
    async with scripted_cluster(hangs) as cluster, Client(cluster.gateway.address) as client:
        stream = client.generate(asked())
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(5):
            await cluster.gateway.load.wait_idle()
        (line,) = lines()
        assert (line["status"], line["output_tokens"]) == ("CANCELLED", 1)


async def test_prompts_and_outputs_are_logged_where_that_is_asked_for(lines: Any) -> None:
    async with scripted_cluster(says("hello")) as cluster:
        logging_one = Gateway(
            "127.0.0.1:0",
            served(),
            [worker.address for worker in (cluster.prefill, *cluster.decodes)],
            GatewayConfig(preflight=False),
            log_content=True,
        )
        await logging_one.start()
        try:
            await asyncio.wait_for(logging_one.ready.wait(), 10)
            async with Client(logging_one.address, admin=logging_one.admin_address) as client:
                await client.answer(asked(), timeout_s=10)
                assert (await client.status()).log_content
            (line,) = lines()
            assert (line["prompt"], line["output"]) == (PROMPT, "hello")
        finally:
            await logging_one.stop()
