"""The gateway's settings as flags: of `isthmus up`, and of `isthmus gateway`, which is here.

One table says what each flag is; it is named like its setting (`cluster/gateway_config.py`), which checks its value.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .terminal import options as opt

PANEL = "Gateway"


def _flag(help: str, default: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=PANEL, **limits)


# Settings of the gateway that are flags, in the order of their help.
FLAGS: dict[str, Any] = {
    "policy": Annotated[
        str | None,
        _flag(
            "How workers are chosen: cost, or to compare round-robin, ..., as docs/routing.md says.",
            "cost",
        ),
    ],
    "local_prefill": Annotated[
        str | None, _flag("Decode workers compute prompts: never, when_cheaper or always.", "when_cheaper")
    ],
    "replays": Annotated[int | None, _flag("Times that one request may be placed again.", "16", min=0, metavar="N")],
    "restart_wait_s": Annotated[
        float | None, _flag("How long a request waits for lost workers to be back.", "30", min=0, metavar="S")
    ],
    "max_waiting": Annotated[
        int | None,
        _flag("Requests of one priority that wait for their turn; more are refused.", "256", min=1, metavar="N"),
    ],
    "overcommit": Annotated[
        float | None, _flag("Tokens that run at once, in what all decode workers can hold.", "2", min=0, metavar="N")
    ],
    "tenant_weights": Annotated[
        list[str] | None,
        _flag(
            "Share of a tenant's tokens while others wait, as NAME=WEIGHT; with commas or repeated.",
            "1 for each",
            metavar="NAME=WEIGHT",
        ),
    ],
    "max_request_tokens": Annotated[
        int | None, _flag("Prompt and output of one request.", "no bound", min=2, metavar="N")
    ],
    "max_request_kv_mib": Annotated[
        float | None, _flag("KV of one request on the wire.", "no bound", min=0, metavar="MIB")
    ],
    "max_request_s": Annotated[float | None, _flag("One request from arrival to end.", "no bound", min=0, metavar="S")],
    "sign_of_life_s": Annotated[
        float | None, _flag("Silence after which an answer's stream gets an empty event.", "10", min=0, metavar="S")
    ],
    "max_prompt_bytes": Annotated[int | None, _flag("UTF-8 of a prompt or chat.", "1048576", min=1, metavar="N")],
    "max_chat_messages": Annotated[int | None, _flag("Messages of a chat.", "4096", min=1, metavar="N")],
    "parse_special": Annotated[
        bool | None,
        _flag(
            "Control tokens that a chat message spells are that, or text.",
            "no",
            "--parse-special",
        ),
    ],
    "preflight": Annotated[
        bool | None,
        _flag("A worker must pass a canary request before it gets others.", "preflight", "--preflight/--no-preflight"),
    ],
}


def takes_gateway_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command all FLAGS; it gets those that were given as the mapping `routing`, by the names of settings."""
    signature = inspect.signature(command)

    @functools.wraps(command)
    def with_flags(**given: Any) -> None:
        routing = {name: value for name in FLAGS if (value := given.pop(name)) is not None}
        if "tenant_weights" in routing:
            routing["tenant_weights"] = _weights(routing["tenant_weights"])
        command(**given, routing=routing)

    own = [parameter for name, parameter in signature.parameters.items() if name != "routing"]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in FLAGS.items()
    ]
    with_flags.__dict__["__signature__"] = signature.replace(parameters=[*own, *flags])
    return with_flags


def _weights(given: list[str]) -> dict[str, float]:
    weights = {}
    for part in (part for group in given for part in group.split(",")):
        tenant, equals, weight = part.rpartition("=")
        try:
            weights[tenant] = float(weight)
        except ValueError:
            equals = ""
        if not equals:
            raise typer.BadParameter(f"{part!r} is not NAME=WEIGHT", param_hint="--tenant-weights")
    return weights


@takes_gateway_flags
def gateway(
    workers: Annotated[list[str], typer.Option(help="host:port of workers, with commas or repeated.")],
    listen: Annotated[str, typer.Option(help="host:port; port 0 picks a free one.")] = opt.DEFAULT_SERVER,
    model: opt.ModelSource = None,
    drain_s: Annotated[float, typer.Option(min=0, help="For running requests when it stops.")] = 30.0,
    jobs_db: opt.JobsDb = None,
    log_level: opt.LogLevel = "warning",
    *,
    routing: dict[str, Any],
) -> None:
    """Run the gateway for a list of workers until Ctrl-C, without Ray.

    [bold]Examples[/]

      isthmus gateway --workers 127.0.0.1:7001,127.0.0.1:7002

      isthmus gateway --listen 0.0.0.0:50051 --workers 10.0.0.7:7001 --workers 10.0.0.8:7002

      isthmus gateway --workers 127.0.0.1:7001,127.0.0.1:7002 --local-prefill never --max-request-s 60
    """
    opt.configure_logs(log_level)
    from ..config import DEFAULT_MODEL, gateway_config
    from ..frontend.gateway import Gateway
    from ..jobs.settings import chosen_url
    from ..launch.foreground import run_service
    from ..text.served import load_served_model

    addresses = [address.strip() for group in workers for address in group.split(",") if address.strip()]
    opt.check_address(listen)
    for address in addresses:
        opt.check_address(address, to_dial=True)
    settings = gateway_config({**routing, "jobs_db": chosen_url(jobs_db)})
    served = load_served_model(model or DEFAULT_MODEL)
    running = Gateway(listen, served, addresses, settings)

    async def start() -> None:
        await running.start()
        opt.say(f"gateway for {served.name} on {running.address}, {len(addresses)} workers")

    async def stop(drain: float) -> None:
        await running.drain(drain)
        await running.stop()

    raise typer.Exit(run_service(start, stop, drain_s))
