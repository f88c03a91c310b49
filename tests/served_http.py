"""A gateway with an HTTP port, on two workers of a small model, in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from harness import Pair, worker_pair
from models import model_path

from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model

MODEL = "tiny-llama"


@asynccontextmanager
async def served_http(model: str = MODEL, **settings: Any) -> AsyncIterator[tuple[Gateway, Pair]]:
    """The gateway, ready, and its workers; `settings` are the gateway's. At the end nothing may be held any more."""
    path = model_path(model)
    async with worker_pair(path) as pair:
        gateway = Gateway(
            *("127.0.0.1:0", load_served_model(path), [pair.prefill.address, pair.decode.address]),
            GatewayConfig(**{"http_listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", **settings}),
        )
        await gateway.start()
        try:
            async with asyncio.timeout(60):
                await gateway.ready.wait()
            yield gateway, pair
            async with asyncio.timeout(10):
                await gateway.load.wait_idle()
        finally:
            await gateway.stop()
