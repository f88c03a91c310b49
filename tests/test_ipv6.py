"""Workers and gateway over IPv6: real servers on [::1], a small model."""

import asyncio
import socket

import pytest
from harness import worker_pair
from models import model_path

from isthmus.cluster.access.settings import AccessSettings
from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model
from isthmus.proto.rpc.addresses import parse_address

MODEL = model_path("tiny-llama")
SAMPLING = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.parametrize("host", ["[::1]", "[::]"])
async def test_an_answer_over_ipv6(host: str) -> None:
    listens = {"listen": f"{host}:0"}
    async with worker_pair(MODEL, prefill=listens, decode=listens) as pair:
        listed = [
            str(parse_address(worker.server.bound)._replace(host="::1")) for worker in (pair.prefill, pair.decode)
        ]
        if host == "[::1]":
            assert [pair.prefill.address, pair.decode.address] == listed
        config = GatewayConfig(access=AccessSettings(anonymous=True))  # [::] is not this host alone
        gateway = Gateway(f"{host}:0", load_served_model(MODEL), listed, config)
        try:
            await gateway.start()
            port = parse_address(gateway.address).port
            async with asyncio.timeout(60), Client(f"[::1]:{port}") as client:
                await gateway.ready.wait()
                answer = await client.answer(build_request(token_ids=range(1, 100), sampling=SAMPLING))
            assert len(answer.token_ids) == 5
            assert gateway.address == f"{host}:{port}"
        finally:
            await gateway.stop()
