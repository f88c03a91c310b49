"""`isthmus supervise`."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import options as opt
from .terminal.flags import Flag, command_with, given

if TYPE_CHECKING:
    from ..config import ClusterConfig

GONE = 1  # exit code where Ray is gone: whoever started this starts it anew


def supervise(
    ctx: typer.Context,
    listen: Annotated[
        str | None, typer.Option(help="host:port for status, orders and gateways; port 0 picks a free one.")
    ] = None,
    stop_workers: Annotated[
        bool, typer.Option("--stop-workers", help="Drain and end all workers of the cluster, then end.")
    ] = False,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = opt.DEFAULT_LOG_LEVEL,
) -> None:
    """Start, guard and scale the workers of a cluster on a running Ray, apart from the gateways, until Ctrl-C.

    Workers go on when it ends, and the next one takes them over, by cluster_id. No request needs it.

    [bold]Examples[/]

      isthmus supervise --cluster-id prod --address auto

      isthmus supervise --config cluster.yaml --address 10.0.0.5:6379

      isthmus supervise --config cluster.yaml --stop-workers    # ends them for good
    """
    opt.configure_logs(log_level)
    from ...proto.errors import InvalidRequest
    from ..config import load_config

    flags = given(ctx)
    if listen is not None:
        flags = {**flags, "supervisor": {"listen": opt.address(listen)}}
    settings = load_config(config, flags)
    opt.configure_logs(log_level, settings)
    if "cluster_id" not in settings.model_fields_set:
        raise InvalidRequest("cluster_id is not set: by it the workers are found again; name one with --cluster-id")
    raise typer.Exit(_end_workers(settings) if stop_workers else _serve(settings))


_CLUSTER_ID = Flag("cluster_id", help="Name of the cluster, by which its workers are found again; it must be set.")
_ADDRESS = Flag("address", help="Ray to join; default: auto, the one that runs here.")
_THREADS = Flag(
    "threads",
    help="PyTorch threads of a worker; default: half of its host's cores, with worker_port all.",
)
SuperviseCommand = command_with(
    (
        *(_CLUSTER_ID, Flag("prefill"), Flag("decode"), Flag("model", ("--model", "-m")), Flag("codec")),
        *(Flag("dtype", choices=True), Flag("device"), _THREADS, _ADDRESS, Flag("worker_port")),
        *(Flag("prefill_gpus"), Flag("decode_gpus"), Flag("store_dir"), Flag("store_gib"), Flag("drain_s")),
        opt.LOG_FORMAT,
    )
)


def _serve(settings: "ClusterConfig") -> int:
    from ..launch.detached.ray_pool import RayPool
    from ..launch.detached.server import SupervisorServer

    running = SupervisorServer(settings, RayPool(settings))

    async def start() -> None:
        await running.start()
        counts = f"{settings.prefill} prefill and {settings.decode} decode"
        opt.say(f"supervisor of {settings.cluster_id} on {running.address}: {settings.model}, {counts}")

    code = opt.run_process(start, running.stop, settings.drain_s, running.lost)
    return GONE if running.lost.is_set() else code


def _end_workers(settings: "ClusterConfig") -> int:
    from ..launch.detached.ray_pool import RayPool
    from ..launch.detached.server import SupervisorServer
    from ..launch.progress import StartProgress

    shown = StartProgress(opt.line())

    async def end() -> list[str]:
        running = SupervisorServer(settings, RayPool(settings))
        try:
            with shown:
                return await running.end_workers(settings.drain_s, shown.step)
        finally:
            await running.stop()

    names = asyncio.run(end())
    print(f"ended {', '.join(sorted(names))}" if names else f"no worker of {settings.cluster_id} runs")
    return 0
