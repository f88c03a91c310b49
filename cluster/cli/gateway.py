"""`isthmus gateway`, and the flags that it shares with `isthmus up`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import options as opt
from .terminal.flags import Flag, command_with, given
from .terminal.hints import hints

if TYPE_CHECKING:
    from ..config import ClusterConfig
    from ..gateway_config import GatewayConfig


def _weights(texts: list[str]) -> dict[str, float]:
    from ..gateway_config import parse_weights

    try:
        return parse_weights(",".join(texts))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _addresses(texts: list[str]) -> list[str]:
    addresses = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    return [opt.address_to_dial(address) for address in addresses]


_PARSERS: dict[str, Callable[[Any], Any]] = {"tenant_weights": _weights, "health_listen": opt.address}
# Those of a gateway that are flags, in the order of the help.
GATEWAY_FLAGS = tuple(
    Flag(f"gateway.{name}", panel="Gateway", parse=_PARSERS.get(name))
    for name in (
        *(
            "admin_listen",
            "health_listen",
            "engine_protocol",
            "policy",
            "local_prefill",
            "replays",
            "restart_wait_s",
            "max_waiting",
        ),
        *("overcommit", "propagation_s", "tenant_weights", "prefix_sharing", "max_request_tokens"),
        "max_request_kv_mib",
        *("max_request_s", "sign_of_life_s"),
        *("max_prompt_bytes", "max_chat_messages", "parse_special", "chat_template", "preflight"),
    )
)


def _workers(settings: "GatewayConfig") -> tuple[str, ...]:
    if not settings.workers:
        why = "no workers: name them with --workers, or as workers: under gateway: in the settings, or a --supervisor"
        raise typer.BadParameter(why)
    return settings.workers


def _settings(config: Path | None, flags: dict[str, Any], listen: str | None) -> "ClusterConfig":
    from ...proto.rpc.addresses import parse_address
    from ..config import load_config

    if listen is not None:
        host, port = parse_address(opt.address(listen, option="--listen"))
        flags |= {"host": host, "port": port}
    return load_config(config, flags).with_jobs()


def gateway(
    ctx: typer.Context,
    listen: Annotated[
        str | None,
        typer.Option(help="host:port; port 0 picks a free one; default: host and port of the settings."),
    ] = None,
    http_port: opt.HttpPort = None,
    no_http: opt.NoHttp = False,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = opt.DEFAULT_LOG_LEVEL,
) -> None:
    """Run the gateway for a list of workers, or those of a supervisor, until Ctrl-C, without Ray.

    [bold]Examples[/]

      isthmus gateway --workers 127.0.0.1:7001,127.0.0.1:7002 --http-port 8000

      isthmus gateway --cluster-id prod --supervisor 127.0.0.1:50053    # of isthmus supervise

      isthmus gateway --config cluster.yaml    # the file of isthmus up, with gateway: {workers: [...]}

      isthmus gateway --listen 0.0.0.0:50051 --keys-file keys.json --workers 10.0.0.7:7001,10.0.0.8:7002

      isthmus gateway --workers 127.0.0.1:7001,127.0.0.1:7002 --local-prefill never --max-request-s 60
    """
    opt.configure_logs(log_level)
    from ..access.access import check_listen
    from ..frontend.gateway import Gateway
    from ..text.served import load_served_model

    settings = _settings(config, given(ctx), listen).with_http(http_port, none=no_http)
    opt.configure_logs(log_level, settings)
    check_listen(settings.gateway.access, settings.listen)
    supervisor = settings.gateway.supervisor
    workers = () if supervisor else _workers(settings.gateway)
    served = load_served_model(settings.model, settings.model_manifest, settings.gateway.chat_template)
    running = Gateway(
        *(settings.listen, served, list(workers), settings.gateway),
        log_content=settings.log_content,
        security=settings.security("gateway"),
    )

    async def start() -> None:
        await running.start()
        where = f"{running.address} (admin: {running.admin_address}, HTTP: {running.http_url or 'none'})"
        whose = f"workers of {supervisor}" if supervisor else f"{len(workers)} workers"
        opt.say(f"gateway for {served.name} on {where}, {whose}")
        for line in hints(settings, running.address):
            opt.say(line)

    async def stop(drain: float) -> None:
        await running.drain(drain)
        await running.stop()

    raise typer.Exit(opt.run_process(start, stop, settings.drain_s))


_WORKERS = Flag("gateway.workers", parse=_addresses)
_SUPERVISOR = Flag("gateway.supervisor", parse=opt.address_to_dial)
_CLUSTER_ID = Flag("cluster_id", help="Cluster of its certificate and its workers; default: that of neither.")
GatewayCommand = command_with(
    (
        *(_WORKERS, _SUPERVISOR, _CLUSTER_ID, Flag("model", ("--model", "-m"))),
        *(Flag("model_manifest"), Flag("drain_s")),
        *(opt.JOBS_DB, opt.KEYS_FILE, opt.LOG_FORMAT, *GATEWAY_FLAGS),
    )
)
