"""`isthmus batch run`: a file of requests through the idle hours of the pool."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal import options as opt
from ..terminal.connection import ClientCommand, api_key

if TYPE_CHECKING:
    from rich.progress import Progress

    from ...client.batch_output import Paths
    from ...client.batch_run import Plan, Tally

batch_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Run files of requests through the idle hours of the cluster."
)
INTERRUPTED, FAILED = 130, 1
PATIENCE_S = 600.0  # of a run whose gateway is away


@batch_app.callback()
def _batch() -> None:
    pass


@batch_app.command("run", cls=ClientCommand)
def batch_run(
    source: Annotated[Path, typer.Argument(metavar="INPUT", exists=True, dir_okay=False, help="Requests, JSON lines.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Answers, JSON lines.")],
    unordered: Annotated[bool, typer.Option("--unordered", help="Write answers as they come.")] = False,
    model: Annotated[str, typer.Option(help="For all lines, instead of the models that they name.")] = "",
    priority: opt.JobPriority = "batch",
    tenant: Annotated[str, typer.Option(help="Whose jobs they are.")] = "",
    piece: Annotated[int, typer.Option("--job-size", min=1, max=10_000, help="Requests in one job.")] = 50,
    under_way: Annotated[int, typer.Option("--jobs", min=1, max=1000, help="Jobs under way at once.")] = 8,
    as_json: opt.Json = False,
    server: opt.Server = opt.DEFAULT_SERVER,
) -> None:
    """Answer all requests of a file: OpenAI's batch format, or lines of {"prompt": ...}.

    Ctrl-C stops it; the same command again goes on. Bad lines go to OUTPUT.errors.jsonl with their numbers.

    [bold]Examples[/]

      isthmus batch run prompts.jsonl -o answers.jsonl

      isthmus batch run openai-batch.jsonl -o answers.jsonl --model smollm2-135m --unordered
    """
    from ...client.batch_output import Paths
    from ...client.batch_run import Plan

    plan = Plan(
        model="",
        instead=model,
        priority=priority,
        tenant=tenant,
        piece=piece,
        under_way=under_way,
        ordered=not unordered,
    )
    try:
        tally = asyncio.run(_run(server, source, Paths(output=output), plan, quiet=as_json))
    except KeyboardInterrupt:
        print("\nstopped; the same command again goes on from here", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    _report(tally, Paths(output=output), as_json)
    if tally.failed:
        raise typer.Exit(FAILED)


async def _run(server: str, source: Path, paths: "Paths", plan: "Plan", *, quiet: bool) -> "Tally":
    from dataclasses import replace

    from ...client.batch_output import BatchFiles
    from ...client.batch_run import BatchRun, check_lines
    from ...client.jobs import JobsClient

    async with opt.gateway_client(server) as gateway:
        served = (await gateway.model(plan.instead)).name
    plan = replace(plan, model=served)
    total = check_lines(source, served, plan.instead)
    settings = {"order": plan.ordered, "job size": plan.piece, "model": plan.instead, "tenant": plan.tenant}
    settings["priority"] = plan.priority
    progress = _progress(quiet)
    async with (
        opt.transport_to(server) as transport,
        JobsClient(server, transport, patience_s=PATIENCE_S, api_key=api_key()) as client,
    ):
        with BatchFiles.open(paths, source, settings) as files, progress:
            bar = progress.add_task("", total=total, completed=len(files.done), failed="")

            def show_progress(tally: "Tally") -> None:
                failed = f"{tally.failed} failed" if tally.failed else ""
                progress.update(bar, completed=tally.answered + tally.failed, failed=failed)

            tally = await BatchRun(client, source, files, plan, show_progress).run()
            files.finish()
    return tally


def _progress(quiet: bool) -> "Progress":
    """Done of all, rate, time left; on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "-/s")

    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("[red]{task.fields[failed]}[/]"),
        console=Console(stderr=True),
        disable=quiet,
        speed_estimate_period=60,
    )


def _report(tally: "Tally", paths: "Paths", as_json: bool) -> None:
    import json

    errors = str(paths.errors) if tally.failed else None
    if as_json:
        print(json.dumps({"answered": tally.answered, "failed": tally.failed, "errors": errors}))
    else:
        failed = f", {tally.failed} failed: {errors}" if errors else ""
        print(f"{tally.answered} answered in {paths.output}{failed}", file=sys.stderr)
