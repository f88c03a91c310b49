"""`isthmus up`, `demo` and `worker prefill|decode`."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .gateway import takes_gateway_flags
from .terminal import options as opt

if TYPE_CHECKING:
    from ..config import ClusterConfig, Role
    from ..frontend.gateway import Gateway

worker_app = typer.Typer(
    no_args_is_help=True, help="Run one worker in this process, without Ray.", rich_markup_mode="rich"
)


@takes_gateway_flags
def up(
    prefill: Annotated[int | None, typer.Option(min=1, help="Prefill workers.", show_default="1")] = None,
    decode: Annotated[int | None, typer.Option(min=1, help="Decode workers.", show_default="1")] = None,
    model: opt.ModelSource = None,
    codec: Annotated[str | None, typer.Option(help="Of the KV transfer by default.", show_default="tq-k4v4")] = None,
    host: Annotated[str | None, typer.Option(help="To listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="0 picks a free one.", show_default="50051")] = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: a local Ray.")] = None,
    store_dir: opt.StoreDir = None,
    store_gib: opt.StoreGib = None,
    jobs_db: opt.JobsDb = None,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = "warning",
    *,
    routing: dict[str, Any],
) -> None:
    """Start a cluster and run it until Ctrl-C, which drains and stops everything.

    [bold]Examples[/]

      isthmus up

      isthmus up --prefill 1 --decode 2 --codec raw --dtype float32

      isthmus up --config cluster.yaml --port 7000

      isthmus up --prefill 2 --decode 2 --local-prefill never --tenant-weights research=3,web=1

      isthmus up --address auto    # on the Ray that runs here already
    """
    begun_s = time.monotonic()
    opt.configure_logs(log_level)
    from ..config import load_config

    flags = {
        "prefill": prefill,
        "decode": decode,
        "model": model,
        "codec": codec,
        "host": host,
        "port": port,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "address": address,
        "store_dir": store_dir,
        "store_gib": store_gib,
    }
    settings = load_config(config, flags, routing).with_jobs(jobs_db)
    raise typer.Exit(_serve_cluster(settings, begun_s))


def demo(
    codec: Annotated[str | None, typer.Option(help="Of the KV transfer.", show_default="tq-k4v4")] = None,
    model: opt.ModelSource = None,
    dtype: opt.Dtype = None,
    as_json: opt.Json = False,
) -> None:
    """Start a small cluster, send it real prompts, show the answers and what moving their KV took.

    [bold]Examples[/]

      isthmus demo

      isthmus demo --codec raw
    """
    opt.configure_logs("warning")
    from ..config import load_config
    from .demo.demo import run_demo

    settings = load_config(None, {"codec": codec, "model": model, "dtype": dtype, "port": 0})
    raise typer.Exit(run_demo(settings, as_json=as_json))


@worker_app.command("prefill")
def worker_prefill(
    listen: opt.WorkerListen = None,
    model: opt.ModelSource = None,
    codec: opt.WorkerCodec = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.WorkerThreads = None,
    name: opt.WorkerName = None,
    advertise: opt.Advertise = None,
    store_dir: opt.StoreDir = None,
    store_gib: opt.StoreGib = None,
    drain_s: opt.WorkerDrain = 30.0,
    dry_run: opt.DryRun = False,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = "warning",
) -> None:
    """Run a prefill worker until Ctrl-C.

    [bold]Examples[/]

      isthmus worker prefill --listen 127.0.0.1:7001

      isthmus worker prefill --listen 0.0.0.0:7001 --advertise 10.0.0.7:7001 --model ./my-model

      isthmus worker prefill --store-dir /var/lib/isthmus/pages --store-gib 50
    """
    flags = _worker_flags(listen, model, codec, dtype, device, threads, name, advertise)
    store = {"store_dir": store_dir, "store_gib": store_gib}
    flags |= {name: value for name, value in store.items() if value is not None}
    _run_worker("prefill", flags, config, drain_s, log_level, dry_run=dry_run)


@worker_app.command("decode")
def worker_decode(
    listen: opt.WorkerListen = None,
    model: opt.ModelSource = None,
    codec: opt.WorkerCodec = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.WorkerThreads = None,
    name: opt.WorkerName = None,
    advertise: opt.Advertise = None,
    drain_s: opt.WorkerDrain = 30.0,
    dry_run: opt.DryRun = False,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = "warning",
) -> None:
    """Run a decode worker until Ctrl-C.

    [bold]Examples[/]

      isthmus worker decode --listen 127.0.0.1:7002

      isthmus worker decode --listen 127.0.0.1:7002 --config decode.yaml

      isthmus worker decode --model ./my-model --dry-run    # what memory it would take
    """
    flags = _worker_flags(listen, model, codec, dtype, device, threads, name, advertise)
    _run_worker("decode", flags, config, drain_s, log_level, dry_run=dry_run)


def _serve_cluster(settings: "ClusterConfig", begun_s: float) -> int:
    from ..launch.foreground import run_service
    from ..launch.ray_cluster import RayCluster
    from ..launch.steps import ShownSteps
    from ..launch.supervisor import Supervisor

    shown = ShownSteps()
    supervisor = Supervisor(settings, RayCluster(settings), shown.step)

    async def start() -> None:
        with shown:
            running = await supervisor.start()
        _welcome(settings, running, time.monotonic() - begun_s)

    async def stop(drain_s: float) -> None:
        if drain_s:
            opt.say("stopping: running requests may end; Ctrl-C again stops at once")
        await supervisor.stop(drain_s)

    return run_service(start, stop, settings.drain_s)


def _welcome(settings: "ClusterConfig", running: "Gateway", took_s: float) -> None:
    workers = f"{settings.prefill} prefill and {settings.decode} decode"
    opt.say(f"ready on {running.address}: {settings.model}, {workers}, codec {settings.codec} ({took_s:.1f} s)")
    server = "" if running.address == opt.DEFAULT_SERVER else f" --server {running.address}"
    opt.say(f'try: isthmus generate --chat{server} "Why is the sky blue?"')


def _worker_flags(*values: Any) -> dict[str, Any]:
    names = ("listen", "model", "default_codec", "dtype", "device", "threads", "name", "advertise")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _run_worker(
    role: "Role", flags: dict[str, Any], config: Path | None, drain_s: float, log_level: str, *, dry_run: bool
) -> None:
    opt.configure_logs(log_level)
    from ..config import load_worker_settings
    from ..launch.host import activity, end_process, thread_settings, usable_cores
    from ..launch.seat import WorkerSeat, settings_of_both

    for flag in ("listen", "advertise"):
        if flag in flags:
            opt.check_address(flags[flag], to_dial=flag == "advertise")
    settings = load_worker_settings(role, config, flags, default_threads=usable_cores())
    os.environ.update(thread_settings(settings["threads"]))  # before torch is imported
    if dry_run:
        from .memory import show_plan

        return show_plan(role, settings)
    from ..launch.foreground import run_service
    from ..launch.steps import ShownSteps, telling

    seat = WorkerSeat(role, settings_of_both(role, settings), end_process)

    async def doing() -> str:
        return activity()

    async def start() -> None:
        with ShownSteps() as shown, shown.step(f"model {settings['model']}") as tell:
            await telling(seat.start(), doing, tell)
        opt.say(f"{role} worker for {settings['model']} on {seat.address}")

    async def stop(timeout_s: float) -> None:
        await seat.drain(timeout_s)
        await seat.stop()

    raise typer.Exit(run_service(start, stop, drain_s, seat.emptied))
