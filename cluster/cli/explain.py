"""`isthmus explain`."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import options as opt
from .terminal.prompt import read_prompt

if TYPE_CHECKING:
    from rich.text import Text

    from ...proto.common_pb2 import Candidate
    from ...proto.generation_pb2 import GenerateRequest
    from ...proto.worker_pb2 import Explanation

ANSWER_S = 10.0
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
    admin: opt.Admin = opt.DEFAULT_ADMIN,
) -> None:
    """Show where a request would run and what the candidates would cost, in milliseconds. Nothing is run.

    [bold]Examples[/]

      isthmus explain "The sea is"

      isthmus explain --file story.txt --max-tokens 64 --json
    """
    from google.protobuf.json_format import MessageToDict

    from ..client.client import build_request

    text = read_prompt(prompt, file)
    request = build_request(
        prompt=None if chat else text,
        chat=[{"role": "user", "content": text}] if chat else None,
        sampling={"max_tokens": max_tokens},
        codec=codec,
    )
    explanation = asyncio.run(_ask(admin, request))
    if as_json:
        print(
            json.dumps(
                MessageToDict(explanation, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            )
        )
        return
    _show(explanation)


async def _ask(admin: str, request: "GenerateRequest") -> "Explanation":
    async with opt.admin_of(admin) as cluster:
        return await cluster.Explain(request, timeout=ANSWER_S)


def _show(explanation: "Explanation") -> None:
    from rich.console import Console

    from .terminal.columns import print_lines, table_lines

    console = Console()
    rows = [_cells(candidate) for candidate in explanation.candidates]
    figures = [name for name in COLUMNS if name not in ("decode", "prefill")]
    lines = table_lines(("chosen", *COLUMNS), rows, right=figures)
    if console.is_terminal and max(line.cell_len for line in lines) > console.width:
        lines = [line for row in rows for line in _block(row)]
    print_lines(lines, console)
    print_lines(
        [
            f"policy {explanation.policy}, local prefill {explanation.local_prefill} · in ms",
            f"{explanation.prompt_tokens} prompt tokens · answers of {explanation.output_tokens:.0f} tokens",
        ],
        console,
    )


def _cells(candidate: "Candidate") -> list[str]:
    values = [getattr(candidate, field) for field in COLUMNS.values()]
    shown = [f"{value:.1f}" if isinstance(value, float) else str(value) or "itself" for value in values]
    return ["yes" if candidate.chosen else "no", *shown]


def _block(row: list[str]) -> "list[Text]":
    """A candidate in several lines, for a terminal that is narrower than the table."""
    from rich.text import Text

    cell = dict(zip(("chosen", *COLUMNS), row, strict=True))
    head = f"decode {cell['decode']}, prefill {cell['prefill']}: total {cell['total']}"
    first, second = ("cached", "held", "wait", "queue"), ("compute", "transfer", "steps", "damage")
    lines = [Text(head + (" (chosen)" if cell["chosen"] == "yes" else ""), style="bold")]
    return lines + [Text("  " + ", ".join(f"{name} {cell[name]}" for name in names)) for names in (first, second)]
