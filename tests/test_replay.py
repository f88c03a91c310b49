"""Decode workers are killed in the middle of real answers: the client gets the tokens of the undisturbed run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from models import model_path

from isthmus.cluster.client.client import Answer, Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.generation_pb2 import GenerateEvent

PROMPT = [(13 * position + 5) % 500 for position in range(200)]
GREEDY = {"temperature": 0, "max_tokens": 150, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": 150, "ignore_eos": True}


@dataclass
class Cluster:
    """One prefill worker, two decode workers that can be killed, and a client of the gateway."""

    settings: dict[str, Any]
    decodes: dict[str, DecodeWorker]
    client: Client
    killed: int = 0
    asked: int = 0

    async def kill(self, address: str) -> None:
        """Ends a decode worker at once and starts it anew."""
        await self.decodes[address].stop()
        self.killed += 1
        worker = self.decodes[address] = DecodeWorker(DecodeConfig(**self.settings, listen=address))
        await worker.start()

    async def answer(self, sampling: dict[str, Any], codec: str, *, kill_at: tuple[int, ...] = ()) -> Answer:
        """An answer; at so many tokens the worker that makes it is killed."""
        tokens, kills, left = 0, list[asyncio.Task[None]](), list(kill_at)

        def count(event: GenerateEvent) -> None:
            nonlocal tokens
            assert event.index == tokens or not event.token_ids
            tokens += len(event.token_ids)
            if left and tokens >= left[0]:
                left.pop(0)
                busy = [a for a, w in self.decodes.items() if w.server.report().running_requests]
                kills.extend(asyncio.create_task(self.kill(address)) for address in busy)

        request = build_request(token_ids=PROMPT, sampling=sampling, codec=codec)
        # No page of an answer before: what is computed on packed pages differs from what was computed at once.
        self.asked, request.tenant = self.asked + 1, f"tenant-{self.asked}"
        answer = await self.client.answer(request, on_event=count, timeout_s=60)
        await asyncio.gather(*kills)
        assert not left
        return answer


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    shared = {"model": model_path("tiny-llama"), "dtype": "fp32", "tls": "off"}
    prefill = PrefillWorker(PrefillConfig(**shared))
    decodes = [DecodeWorker(DecodeConfig(**shared)) for _ in range(2)]
    for worker in (prefill, *decodes):
        await worker.start()
    addresses = [worker.address for worker in (prefill, *decodes)]
    gateway = Gateway("127.0.0.1:0", load_served_model(shared["model"]), addresses, GatewayConfig(preflight=False))
    await gateway.start()
    by_address = {worker.address: worker for worker in decodes}
    try:
        async with asyncio.timeout(20), Client(gateway.address) as client:
            while len(gateway.fleet.table.routing.decode) < 2 or not gateway.fleet.table.routing.prefill:
                await gateway.fleet.change.wait()
        async with Client(gateway.address) as client:
            yield Cluster(shared, by_address, client)
    finally:
        await gateway.stop()
        for worker in (prefill, *by_address.values()):
            await worker.stop()


@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
async def test_a_killed_decode_worker_changes_no_token(codec: str) -> None:
    async with cluster() as running:
        for sampling in (GREEDY, SEEDED):
            whole = await running.answer(sampling, codec)
            assert (len(whole.token_ids), whole.timings.replays) == (150, 0)
            killed = await running.answer(sampling, codec, kill_at=(1, 70))
            assert (killed.token_ids, killed.text) == (whole.token_ids, whole.text)
            assert killed.timings.replays >= 1
        assert running.killed == 4
        for worker in running.decodes.values():
            async with asyncio.timeout(5):
                while (report := worker.server.report()).pages.in_use or report.running_requests:
                    await asyncio.sleep(0.02)
