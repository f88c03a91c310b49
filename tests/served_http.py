"""A gateway with an HTTP port, on two workers of a small model, in this process."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from harness import Pair, worker_pair
from models import made, model_path

from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model

TEMPLATE = (
    "{% for tool in tools or [] %}[tool {{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}[call {{ call.function.name }}]{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_model(template: str = TEMPLATE, name: str = "tiny-llama-chat") -> str:
    """The folder, of that name, of a small model with a chat template."""

    def make(folder: Path) -> None:
        shutil.copytree(model_path("tiny-llama"), folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)

    return str(made(name, make))


@asynccontextmanager
async def served_http(model: str | None = None, **settings: Any) -> AsyncIterator[tuple[Gateway, Pair]]:
    """The gateway, ready, and its workers; `settings` are the gateway's. `model`: a folder instead of that of
    `chat_model`. At the end nothing may be held any more."""
    path = model or chat_model()
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
