"""`isthmus up` and `demo`."""

import time
from typing import TYPE_CHECKING

import typer

from .gateway import GATEWAY_FLAGS
from .terminal import options as opt
from .terminal.flags import Flag, command_with, given
from .terminal.hints import hints

if TYPE_CHECKING:
    from ..config import ClusterConfig
    from ..frontend.gateway import Gateway

_MODEL = Flag("model", ("--model", "-m"))
_DTYPE = Flag("dtype", choices=True)
UP_FLAGS = (
    *(
        Flag("prefill"),
        Flag("decode"),
        _MODEL,
        Flag("model_manifest"),
        Flag("codec"),
        Flag("host"),
        Flag("port"),
        _DTYPE,
    ),
    *(Flag("device"), Flag("threads"), Flag("address"), Flag("store_dir"), Flag("store_gib")),
    *(Flag("store_key_file"), opt.JOBS_DB, opt.KEYS_FILE, opt.LOG_FORMAT, *GATEWAY_FLAGS),
)


def up(
    ctx: typer.Context,
    http_port: opt.HttpPort = None,
    no_http: opt.NoHttp = False,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = opt.DEFAULT_LOG_LEVEL,
) -> None:
    """Start a cluster and run it until Ctrl-C, which drains and stops everything.

    [bold]Examples[/]

      isthmus up

      isthmus up --prefill 1 --decode 2 --codec raw --dtype float32

      isthmus up --config cluster.yaml --port 7000

      isthmus up --host 0.0.0.0 --keys-file keys.json    # for other hosts, with API keys (isthmus keys add)

      isthmus up --prefill 2 --decode 2 --local-prefill never --tenant-weights research=3,web=1

      isthmus up --http-port 0    # HTTP on a free port

      isthmus up --address auto    # on the Ray that runs here already
    """
    begun_s = time.monotonic()
    opt.configure_logs(log_level)
    from ..access.access import check_listen
    from ..config import load_config

    settings = load_config(config, given(ctx)).with_jobs().with_http(http_port, none=no_http, by_default=True)
    opt.configure_logs(log_level, settings)
    check_listen(settings.gateway.access, settings.listen)
    if not settings.prefill or not settings.decode:
        raise typer.BadParameter("prefill or decode is 0; a cluster has one of each; `isthmus supervise` may have none")
    raise typer.Exit(_serve_cluster(settings, begun_s))


def demo(ctx: typer.Context, as_json: opt.Json = False) -> None:
    """Start a small cluster, send it real prompts, show the answers and what moving their KV took.

    [bold]Examples[/]

      isthmus demo

      isthmus demo --codec raw
    """
    opt.configure_logs(opt.DEFAULT_LOG_LEVEL)
    from ..config import load_config
    from .demo.demo import run_demo

    settings = load_config(None, {**given(ctx), "port": 0, "gateway": {"jobs_db": "none"}}).with_jobs()
    raise typer.Exit(run_demo(settings, as_json=as_json))


UpCommand = command_with(UP_FLAGS)
DemoCommand = command_with((Flag("codec"), _MODEL, _DTYPE))


def _serve_cluster(settings: "ClusterConfig", begun_s: float) -> int:
    from ..launch.progress import StartProgress
    from ..launch.ray_cluster import RayCluster
    from ..launch.supervisor import Supervisor

    shown = StartProgress(opt.line())
    supervisor = Supervisor(settings, RayCluster(settings), shown.step)

    async def start() -> None:
        with shown:
            running = await supervisor.start()
        _welcome(settings, running, time.monotonic() - begun_s)

    async def stop(drain_s: float) -> None:
        if drain_s:
            opt.say("stopping: running requests may end; Ctrl-C again stops at once")
        await supervisor.stop(drain_s)

    return opt.run_process(start, stop, settings.drain_s)


def _welcome(settings: "ClusterConfig", running: "Gateway", took_s: float) -> None:
    workers = f"{settings.prefill} prefill and {settings.decode} decode"
    opt.say(f"ready on {running.address}: {settings.model}, {workers}, codec {settings.codec} ({took_s:.1f} s)")
    admin = f"export ISTHMUS_ADMIN={running.admin_address}; " if running.admin_address != opt.DEFAULT_ADMIN else ""
    opt.say(f"status and orders on {running.admin_address}: {admin}isthmus status")
    if running.http_url is not None:
        opt.say(f"HTTP, as OpenAI's API: {running.http_url}/v1")
    for line in hints(settings, running.address):
        opt.say(line)
