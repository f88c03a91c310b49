"""A gateway, a prefill worker and decode workers in this process; a decode worker can be killed and started anew."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from isthmus.cluster.client.client import Client
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker


@dataclass
class InProcess:
    """What runs, and a client of it."""

    settings: dict[str, Any]
    prefill: PrefillWorker
    decodes: dict[str, DecodeWorker]  # by address
    client: Client
    killed: int = 0

    async def kill(self, address: str) -> None:
        """Ends a decode worker at once and starts it anew."""
        await self.decodes[address].stop()
        self.killed += 1
        worker = self.decodes[address] = DecodeWorker(DecodeConfig(**self.settings, listen=address))
        await worker.start()

    async def kill_busy(self) -> None:
        """The same of one that has a request, where one has."""
        busy = [address for address, worker in self.decodes.items() if worker.server.report().running_requests]
        if busy:
            await self.kill(busy[0])


@asynccontextmanager
async def in_process(model: str, *, decodes: int = 2, **gateway_settings: Any) -> AsyncIterator[InProcess]:
    """Ready workers of one model, in fp32 and without encryption."""
    settings = {"model": model, "dtype": "fp32", "tls": "off"}
    prefill = PrefillWorker(PrefillConfig(**settings))
    workers = [DecodeWorker(DecodeConfig(**settings)) for _ in range(decodes)]
    for worker in (prefill, *workers):
        await worker.start()
    by_address = {worker.address: worker for worker in workers}
    config = GatewayConfig(preflight=False, **gateway_settings)
    gateway = Gateway("127.0.0.1:0", load_served_model(model), [prefill.address, *by_address], config)
    await gateway.start()
    try:
        async with asyncio.timeout(20):
            table = gateway.fleet.table.routing
            while len(table.decode) < decodes or not table.prefill:
                await gateway.fleet.change.wait()
        async with Client(gateway.address) as client:
            yield InProcess(settings, prefill, by_address, client)
    finally:
        await gateway.stop()
        for worker in (prefill, *by_address.values()):
            await worker.stop()
