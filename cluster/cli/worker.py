"""`isthmus worker prefill|decode`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .terminal import options as opt
from .terminal.flags import Flag, command_with, given

if TYPE_CHECKING:
    from ..config import Role

worker_app = typer.Typer(
    no_args_is_help=True, help="Run one worker in this process, without Ray.", rich_markup_mode="rich"
)


def _flags(section: str, *own: str) -> tuple[Flag, ...]:
    return (
        Flag(f"{section}.listen", parse=opt.address),
        Flag(f"{section}.model", ("--model", "-m")),
        Flag(f"{section}.model_manifest"),
        Flag(f"{section}.default_codec", ("--codec",)),
        Flag(f"{section}.dtype", choices=True),
        *(Flag(f"{section}.{name}") for name in ("device", "threads", "name")),
        Flag(f"{section}.advertise", parse=opt.address_for_others),
        Flag(f"{section}.health_listen", parse=opt.address),
        *(Flag(f"{section}.{name}") for name in own),
        Flag("drain_s"),
        opt.LOG_FORMAT,
    )


@worker_app.command("prefill", cls=command_with(_flags("prefill_worker", "store_dir", "store_gib", "store_key_file")))
def worker_prefill(
    ctx: typer.Context,
    dry_run: opt.DryRun = False,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = opt.DEFAULT_LOG_LEVEL,
) -> None:
    """Run a prefill worker until Ctrl-C.

    It takes half of the machine's cores, so that a worker of each role fits on one; --threads says otherwise.

    [bold]Examples[/]

      isthmus worker prefill --listen 127.0.0.1:7001

      isthmus worker prefill --config cluster.yaml    # the file of isthmus up

      isthmus worker prefill --listen 0.0.0.0:7001 --advertise 10.0.0.7:7001 --model ./my-model

      isthmus worker prefill --store-dir /var/lib/isthmus/pages --store-gib 50
    """
    _run_worker("prefill", config, given(ctx), log_level, dry_run=dry_run)


@worker_app.command("decode", cls=command_with(_flags("decode_worker")))
def worker_decode(
    ctx: typer.Context,
    dry_run: opt.DryRun = False,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = opt.DEFAULT_LOG_LEVEL,
) -> None:
    """Run a decode worker until Ctrl-C.

    It takes half of the machine's cores, so that a worker of each role fits on one; --threads says otherwise.

    [bold]Examples[/]

      isthmus worker decode --listen 127.0.0.1:7002

      isthmus worker decode --listen 127.0.0.1:7002 --config cluster.yaml    # the file of isthmus up

      isthmus worker decode --model ./my-model --dry-run    # what memory it would take
    """
    _run_worker("decode", config, given(ctx), log_level, dry_run=dry_run)


def _run_worker(role: "Role", file: Path | None, flags: dict[str, Any], log_level: str, *, dry_run: bool) -> None:
    opt.configure_logs(log_level)
    from ..config import load_config
    from ..launch.role_host import RoleHost, settings_by_role
    from ..launch.worker_thread import activity, cores_for_one, end_process, thread_settings

    config = load_config(file, _for_both(role, flags))
    opt.configure_logs(log_level, config, audit=False)
    threads = cores_for_one()
    settings = config.process_settings(role, default_threads=threads)
    os.environ.update(thread_settings(settings["threads"]))  # before torch is imported
    if dry_run:
        from .memory import show_plan

        return show_plan(role, settings)
    from ..launch.local_orders import LocalOrders
    from ..launch.progress import StartProgress, with_activity

    other = config.process_settings(_other(role), default_threads=threads)
    host = RoleHost(role, settings_by_role(role, settings, other), end_process)
    local = LocalOrders(host)

    async def doing() -> str:
        return activity()

    async def start() -> None:
        await local.start()
        with StartProgress(opt.line()) as shown, shown.step(f"model {settings['model']}") as tell:
            await with_activity(host.start(), doing, tell)
        opt.say(f"{role} worker for {settings['model']} on {host.address} (threads: {settings['threads']})")

    async def stop(timeout_s: float) -> None:
        await host.drain(timeout_s)
        await host.stop()
        await local.stop()

    raise typer.Exit(opt.run_process(start, stop, config.drain_s, host.drained))


def _for_both(role: "Role", flags: dict[str, Any]) -> dict[str, Any]:
    """Flags of a role; those that mean the same in the other one go along where the worker flips."""
    from ..config import SHARED

    own = flags.get(f"{role}_worker", {})
    return {**flags, f"{_other(role)}_worker": {name: value for name, value in own.items() if name in SHARED}}


def _other(role: "Role") -> "Role":
    return "decode" if role == "prefill" else "prefill"
