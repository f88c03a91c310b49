"""A real cluster in this process: one prefill worker, two decode workers that can be killed, and a gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import model_path

from isthmus.cluster.client.client import Answer, Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.generation_pb2 import GenerateEvent, GenerateRequest

PROMPT = [(13 * position + 5) % 500 for position in range(200)]


@dataclass
class Cluster:
    """One prefill worker, two decode workers that can be killed, and a client of the gateway."""

    settings: dict[str, Any]
    prefill: PrefillWorker
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

    async def answer(
        self, sampling: dict[str, Any], codec: str, *, kill_at: tuple[int, ...] = (), tenant: str = ""
    ) -> Answer:
        """An answer; at so many tokens the worker that makes it is killed."""
        tokens, kills, left = 0, list[asyncio.Task[None]](), list(kill_at)

        def count(event: GenerateEvent) -> None:
            nonlocal tokens
            assert event.index == tokens or not event.token_ids
            tokens += len(event.token_ids)
            if left and tokens >= left[0]:
                left.pop(0)
                kills.append(asyncio.create_task(self.kill_busy()))

        answer = await self.client.answer(self.request(sampling, codec, tenant), on_event=count, timeout_s=60)
        await asyncio.gather(*kills)
        assert not left
        return answer

    def request(
        self, sampling: dict[str, Any], codec: str, tenant: str = "", *, tokens: int = len(PROMPT)
    ) -> GenerateRequest:
        """For PROMPT, or its beginning, of a tenant of its own."""
        request = build_request(token_ids=PROMPT[:tokens], sampling=sampling, codec=codec)
        # No page of an answer before: what is computed on packed pages differs from what was computed at once.
        self.asked, request.tenant = self.asked + 1, tenant or f"tenant-{self.asked}"
        return request

    async def kill_busy(self) -> None:
        """Kills the decode workers that have requests now."""
        busy = [a for a, w in self.decodes.items() if w.server.report().running_requests]
        await asyncio.gather(*map(self.kill, busy))

    async def idle(self) -> None:
        """Returns once no decode worker holds a page."""
        for worker in self.decodes.values():
            async with asyncio.timeout(5):
                while (report := worker.server.report()).pages.in_use or report.running_requests:
                    await asyncio.sleep(0.02)


@asynccontextmanager
async def cluster(
    *, store: Path | None = None, decode: dict[str, Any] | None = None, **gateway_settings: Any
) -> AsyncIterator[Cluster]:
    shared = {"model": model_path("tiny-llama"), "dtype": "fp32", "tls": "off"}
    prefill = PrefillWorker(PrefillConfig(**shared, store_dir=None if store is None else str(store)))
    of_decode = shared | (decode or {})
    decodes = [DecodeWorker(DecodeConfig(**of_decode)) for _ in range(2)]
    for worker in (prefill, *decodes):
        await worker.start()
    addresses = [worker.address for worker in (prefill, *decodes)]
    gateway = Gateway(
        "127.0.0.1:0", load_served_model(shared["model"]), addresses, GatewayConfig(preflight=False, **gateway_settings)
    )
    await gateway.start()
    by_address = {worker.address: worker for worker in decodes}
    try:
        async with asyncio.timeout(20), Client(gateway.address) as client:
            while len(gateway.fleet.table.routing.decode) < 2 or not gateway.fleet.table.routing.prefill:
                await gateway.fleet.change.wait()
        async with Client(gateway.address) as client:
            yield Cluster(of_decode, prefill, by_address, client)
    finally:
        await gateway.stop()
        for worker in (prefill, *by_address.values()):
            await worker.stop()
