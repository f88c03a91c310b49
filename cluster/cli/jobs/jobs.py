"""`isthmus jobs submit|list|show|watch|result|cancel|delete`."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..terminal import options as opt
from ..terminal.connection import ClientCommand, api_key
from ..terminal.prompt import read_prompt

if TYPE_CHECKING:
    from ....proto.jobs_pb2 import Job
    from ...client.jobs import JobsClient

jobs_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Submit work, walk away, come back: jobs outlive their client and a gateway's restart.",
)
INTERRUPTED = 130
PATIENCE_S = 60.0  # of a watcher whose gateway is being restarted

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Its id, as submit and list print it.")]
JobIds = Annotated[list[str], typer.Argument(metavar="JOB...", help="Their ids.")]
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="May be repeated.")]
Tenant = Annotated[str, typer.Option(help="Whose job it is.")]
T = TypeVar("T")


@jobs_app.command("submit", cls=ClientCommand)
def jobs_submit(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or a pipe: read it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 file.")] = None,
    lines: Annotated[
        Path | None, typer.Option("--jsonl", exists=True, dir_okay=False, help="One job of all requests of a file.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's chat message.")] = False,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = None,
    stop: opt.Stop = None,
    codec: opt.RequestCodec = "",
    model: opt.RequestModel = "",
    priority: opt.JobPriority = "standard",
    labels: Labels = None,
    tenant: Tenant = "",
    key: Annotated[str, typer.Option(help="Idempotency key: twice the same one is one job.")] = "",
    deadline: Annotated[str | None, typer.Option(help="To be done within: 90s, 10m, 2h, 3d.")] = None,
    retention: Annotated[str | None, typer.Option(help="To be kept for, once ended; default: the cluster's.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it at once.")] = False,
    as_json: opt.Json = False,
    server: opt.Server = opt.DEFAULT_SERVER,
) -> None:
    """Submit a job; its id goes to stdout.

    [bold]Examples[/]

      isthmus jobs submit "The sea is" --max-tokens 500

      isthmus jobs submit --chat --file question.txt --priority batch --label team=search

      isthmus jobs submit --jsonl requests.jsonl --deadline 2h
    """
    from ...client.batch_lines import read_requests
    from ...client.client import build_request
    from ...client.submission import new_submission

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "max_tokens": max_tokens}
    sampling["stop"] = stop or []  # pyright: ignore[reportArgumentType]
    if lines is not None:
        if prompt is not None or file is not None:
            raise typer.BadParameter("give a prompt or --jsonl, not both")
        requests = read_requests(lines, model=model)
    else:
        text = read_prompt(prompt, file)
        asked = {"chat": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        requests = [build_request(**asked, sampling=sampling, codec=codec, model=model)]  # pyright: ignore
    submission = new_submission(
        requests,
        priority=priority,
        labels=_pairs(labels),
        tenant=tenant,
        key=key,
        deadline=deadline,
        retention=retention,
    )
    job = _ask(server, lambda client: client.submit(submission))
    if as_json:
        _print_json([job])
    else:
        print(job.job_id, flush=True)
    if watch:
        _watch(server, job.job_id, 0, as_json)


@jobs_app.command("list", cls=ClientCommand)
def jobs_list(
    state: Annotated[list[str] | None, typer.Option(help="queued, running, succeeded, ...; may be repeated.")] = None,
    labels: Labels = None,
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    since: Annotated[str | None, typer.Option(help="Submitted within: 90s, 10m, 2h, 3d.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 50,
    as_json: opt.Json = False,
    server: opt.Server = opt.DEFAULT_SERVER,
) -> None:
    """List jobs, newest first.

    [bold]Examples[/]

      isthmus jobs list

      isthmus jobs list --state running --label team=search --since 2h

      isthmus jobs list --json --limit 1000
    """
    from ...client.submission import listing

    request = listing(states=state or [], labels=_pairs(labels), tenant=tenant, since=since)

    async def collect(client: "JobsClient") -> "list[Job]":
        found: list[Job] = []
        while len(found) < limit:
            request.page_size = min(1000, limit - len(found))
            page = await client.jobs(request)
            found += page.jobs
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        return found

    found = _ask(server, collect)
    if as_json:
        _print_json(found)
        return
    from ..terminal.columns import print_lines
    from .tables import jobs_table

    print_lines(jobs_table(found))


@jobs_app.command("show", cls=ClientCommand)
def jobs_show(job_id: JobId, as_json: opt.Json = False, server: opt.Server = opt.DEFAULT_SERVER) -> None:
    """Show how a job stands.

    [bold]Examples[/]

      isthmus jobs show 64e2b0-1f9a

      isthmus jobs show 64e2b0-1f9a --json
    """
    job = _ask(server, lambda client: client.job(job_id))
    if as_json:
        _print_json([job])
        return
    from ..terminal.columns import print_lines
    from .tables import job_table

    print_lines(job_table(job))


@jobs_app.command("watch", cls=ClientCommand)
def jobs_watch(
    job_id: JobId,
    from_event: Annotated[int, typer.Option("--from", min=0, help="With --json: begin with this event.")] = 0,
    as_json: opt.Json = False,
    server: opt.Server = opt.DEFAULT_SERVER,
) -> None:
    """Show a job's text so far, then follow it to its end. Ctrl-C leaves the job running.

    [bold]Examples[/]

      isthmus jobs watch 64e2b0-1f9a

      isthmus jobs watch 64e2b0-1f9a --json --from 200    # events as JSON lines
    """
    _watch(server, job_id, from_event if as_json else 0, as_json)


@jobs_app.command("result", cls=ClientCommand)
def jobs_result(
    job_id: JobId,
    partial: Annotated[bool, typer.Option("--partial", help="Of a job that still runs: what there is.")] = False,
    as_json: opt.Json = False,
    server: opt.Server = opt.DEFAULT_SERVER,
) -> None:
    """Print the answers of a job that has ended; with --json a JSON line for each request.

    [bold]Examples[/]

      isthmus jobs result 64e2b0-1f9a

      isthmus jobs result 64e2b0-1f9a --json > answers.jsonl
    """
    from .tables import as_dict, result_lines

    async def show(client: "JobsClient") -> None:
        job = await client.job(job_id)
        async for result in client.results(job_id, partial=partial):
            if as_json:
                print(json.dumps(as_dict(result), ensure_ascii=False))
            else:
                print(*result_lines(result, alone=job.request_count == 1), sep="\n")

    _ask(server, show)


@jobs_app.command("cancel", cls=ClientCommand)
def jobs_cancel(jobs: JobIds, as_json: opt.Json = False, server: opt.Server = opt.DEFAULT_SERVER) -> None:
    """End jobs; what they have made so far is kept.

    [bold]Examples[/]

      isthmus jobs cancel 64e2b0-1f9a
    """

    async def cancel(client: "JobsClient") -> "list[Job]":
        return [await client.cancel(job_id) for job_id in jobs]

    cancelled = _ask(server, cancel)
    if as_json:
        _print_json(cancelled)


@jobs_app.command("delete", cls=ClientCommand)
def jobs_delete(jobs: JobIds, server: opt.Server = opt.DEFAULT_SERVER) -> None:
    """Forget jobs that have ended, with their results.

    [bold]Examples[/]

      isthmus jobs delete 64e2b0-1f9a
    """

    async def delete(client: "JobsClient") -> None:
        for job_id in jobs:
            await client.delete(job_id)

    _ask(server, delete)


def _watch(server: str, job_id: str, from_event: int, as_json: bool) -> None:
    try:
        state = _ask(server, lambda client: _follow(client, job_id, from_event, as_json))
    except KeyboardInterrupt:
        address = "" if server == opt.DEFAULT_SERVER else f" --server {server}"
        again = f"isthmus jobs watch {job_id}{address}"
        print(f"\nthe job goes on without you; come back with: {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if state != "succeeded":
        raise typer.Exit(1)


async def _follow(client: "JobsClient", job_id: str, from_event: int, as_json: bool) -> str:
    """Shows events until the last; the state that the job ended in."""
    from .tables import TextView, as_dict, state_name

    job = await client.job(job_id)
    client.patience_s = PATIENCE_S
    view = TextView(alone=job.request_count == 1)
    state = state_name(job.state)
    async for event in client.watch(job_id, from_event):
        if event.HasField("state"):
            state = state_name(event.state)
        sys.stdout.write(json.dumps(as_dict(event), ensure_ascii=False) + "\n" if as_json else view.show(event))
        sys.stdout.flush()
    if not as_json:
        sys.stdout.write(view.finish())
        error = (await client.job(job_id)).error
        if state != "succeeded":
            print(f"the job {state}" + (f": {error.code}: {error.message}" if error.code else ""), file=sys.stderr)
    return state


def _ask(server: str, question: "Callable[[JobsClient], Awaitable[T]]") -> T:
    async def ask() -> T:
        async with _client(server) as client:
            return await question(client)

    return asyncio.run(ask())


@asynccontextmanager
async def _client(server: str) -> "AsyncIterator[JobsClient]":
    from ...client.jobs import JobsClient

    async with opt.transport_to(server) as transport, JobsClient(server, transport, api_key=api_key()) as client:
        yield client


def _pairs(labels: list[str] | None) -> dict[str, str]:
    pairs = [label.partition("=") for label in labels or ()]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise typer.BadParameter(f"label {key!r} is not KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _print_json(jobs: "list[Job]") -> None:
    from .tables import as_dict

    for job in jobs:
        print(json.dumps(as_dict(job), ensure_ascii=False))
