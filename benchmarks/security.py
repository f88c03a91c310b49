"""What encryption costs, and that certificates can be replaced under load.

python benchmarks/security.py link --json link.json          # GB/s of one link, with TLS and without, in turns
python benchmarks/security.py mixed --json mixed.json        # chats beside long prompts, in turns
python benchmarks/security.py rotation --json rotation.json  # certificates and CA every 10 s, 100 requests at once
"""

import asyncio
import os
import statistics
from pathlib import Path
from typing import Annotated

import typer
from support.link import link_speeds
from support.mixed import Load, mixed_with_and_without_tls
from support.report import Report, conditions, say
from support.rotation import rotate_under_load

app = typer.Typer(no_args_is_help=True)
Json = Annotated[Path | None, typer.Option(help="Write the figures to this file.")]
Tls = Annotated[str, typer.Option(help="What is compared, in this order: auto, off.")]


@app.command()
def link(
    mib: Annotated[int, typer.Option(min=64, help="Of each transfer.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Transfers of each side; the median counts.")] = 5,
    frame_kib: Annotated[list[int] | None, typer.Option(help="Size of frames; repeatable.")] = None,
    tls: Tls = "auto,off",
    json: Json = None,
) -> None:
    """Moves KV frames between two processes over loopback."""
    sides = tls.split(",")
    with Report(json) as report:
        report.put(conditions=conditions(mib=mib, rounds=rounds, tls=sides))
        for kib in frame_kib or [256, 1024, 4096]:
            speeds = link_speeds(sides, kib << 10, mib, rounds)
            medians = {side: round(statistics.median(values), 3) for side, values in speeds.items()}
            turns = {side: [round(value, 3) for value in values] for side, values in speeds.items()}
            row = {"frame_kib": kib, "gb_per_s": medians, "turns": turns}
            if {"auto", "off"} <= set(sides):
                row["ratio"] = round(medians["auto"] / medians["off"], 3)
            say(f"frames of {kib} KiB: {medians} GB/s")
            report.append("link", row)


@app.command()
def mixed(
    model: Annotated[str, typer.Option(help="What the workers serve.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="Of our weights.")] = "auto",
    seconds: Annotated[float, typer.Option(min=1, help="Of load in each turn.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 2,
    tls: Tls = "auto,off",
    json: Json = None,
) -> None:
    """Sends the same chats and long prompts to two workers with TLS, and to two without."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with Report(json) as report:
        report.put(conditions=conditions(model=model, dtype=dtype, seconds=seconds, rounds=rounds, tls=tls))
        report.put(
            mixed=asyncio.run(mixed_with_and_without_tls(model, dtype, Load(seconds=seconds), tls.split(","), rounds))
        )


@app.command()
def rotation(
    model: Annotated[str, typer.Option(help="What the workers serve.")] = "smollm2-135m",
    seconds: Annotated[float, typer.Option(min=5, help="How long it goes on.")] = 180,
    every_s: Annotated[float, typer.Option(min=5, help="Time between two new CAs.")] = 10,
    at_once: Annotated[int, typer.Option(min=1, help="Requests that run.")] = 100,
    json: Json = None,
) -> None:
    """Replaces the CA and all certificates of a running cluster again and again."""
    with Report(json) as report:
        report.put(conditions=conditions(model=model, seconds=seconds, every_s=every_s, at_once=at_once))
        report.put(**asyncio.run(rotate_under_load(model, seconds, every_s, at_once)))


if __name__ == "__main__":
    app()
