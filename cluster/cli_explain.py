"""`isthmus explain`."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli_options as opt
from .cli_prompt import read_prompt

if TYPE_CHECKING:
    from ..proto.generation_pb2 import GenerateRequest
    from ..proto.worker_pb2 import Explanation

COLUMNS = {
    "decode": "decode",
    "prefill": "prefill",
    "cached": "cached_tokens",
    "held": "held_tokens",
    "wait": "wait_ms",
    "queue": "queue_ms",
    "compute": "compute_ms",
    "transfer": "transfer_ms",
    "steps": "steps_ms",
    "damage": "damage_ms",
    "total": "total_ms",
}


def explain(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or a pipe: read it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take it as a user's chat message.")] = False,
    max_tokens: opt.MaxTokens = None,
    codec: opt.RequestCodec = "",
    as_json: opt.Json = False,
    server: opt.Server = opt.DEFAULT_SERVER,
) -> None:
    """Show where a request would run and what the candidates would cost, in milliseconds. Nothing is run.

    [bold]Examples[/]

      isthmus explain "The sea is"

      isthmus explain --file story.txt --max-tokens 64 --json
    """
    from google.protobuf.json_format import MessageToDict

    from .client import build_request

    text = read_prompt(prompt, file)
    request = build_request(
        prompt=None if chat else text,
        chat=[{"role": "user", "content": text}] if chat else None,
        sampling={"max_tokens": max_tokens},
        codec=codec,
    )
    explanation = asyncio.run(_ask(server, request))
    if as_json:
        print(
            json.dumps(
                MessageToDict(explanation, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            )
        )
        return
    _show(explanation)


async def _ask(server: str, request: "GenerateRequest") -> "Explanation":
    async with opt.gateway_client(server) as client:
        return await client.explain(request)


def _show(explanation: "Explanation") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", *COLUMNS):
        table.add_column(name, no_wrap=True, justify="left" if name in ("", "decode", "prefill") else "right")
    for candidate in explanation.candidates:
        values = [getattr(candidate, field) for field in COLUMNS.values()]
        cells = [f"{value:.1f}" if isinstance(value, float) else str(value) or "itself" for value in values]
        table.add_row("→" if candidate.chosen else "", *cells)
    console = Console()
    console.width = max(console.width, 112)  # a table of figures is of no use with its columns cut
    console.print(table)
    console.print(
        f"policy {explanation.policy}, local prefill {explanation.local_prefill} · "
        f"{explanation.prompt_tokens} prompt tokens · answers of {explanation.output_tokens:.0f} tokens · in ms",
        highlight=False,
    )
