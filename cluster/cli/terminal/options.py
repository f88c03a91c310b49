"""Options that several commands share, and what they do with them."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ... import defaults
from .connection import api_key, certificates
from .flags import Flag

if TYPE_CHECKING:
    from ....proto.rpc.transport import Transport
    from ....proto.worker_pb2_grpc import ClusterAsyncStub
    from ...client.client import Client
    from ...config import ClusterConfig

SAMPLING, CLUSTER = "Sampling", "Cluster"

Server = Annotated[
    str,
    typer.Option("--server", "-s", envvar="ISTHMUS_SERVER", help="host:port of the gateway.", show_default=True),
]
DEFAULT_SERVER = defaults.SERVER
Admin = Annotated[
    str,
    typer.Option(
        "--admin", "-a", envvar="ISTHMUS_ADMIN", help="host:port of the gateway's admin port.", show_default=True
    ),
]
DEFAULT_ADMIN = defaults.ADMIN

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error; lines on stderr.")]
DEFAULT_LOG_LEVEL = "warning"
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        exists=True,
        dir_okay=False,
        envvar="ISTHMUS_CONFIG",
        help="YAML file of settings; variables ISTHMUS_... win over it, flags over both.",
    ),
]

Temperature = Annotated[float | None, typer.Option(help="0 is greedy; the default is 1.", rich_help_panel=SAMPLING)]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this sum.", rich_help_panel=SAMPLING)]
TopK = Annotated[int | None, typer.Option(min=0, help="Keep that many tokens; 0: all.", rich_help_panel=SAMPLING)]
MinP = Annotated[
    float | None, typer.Option(help="Keep tokens at least so likely as the best.", rich_help_panel=SAMPLING)
]
Repetition = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Of tokens in prompt and output.", rich_help_panel=SAMPLING),
]
Presence = Annotated[
    float | None,
    typer.Option("--presence-penalty", help="Of tokens in the output, once.", rich_help_panel=SAMPLING),
]
Frequency = Annotated[
    float | None,
    typer.Option("--frequency-penalty", help="Of tokens in the output, each time.", rich_help_panel=SAMPLING),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes the output repeatable.", rich_help_panel=SAMPLING)]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", "-n", min=0, help="End after that many; the default is 256.", rich_help_panel=SAMPLING
    ),
]
MinTokens = Annotated[int | None, typer.Option(min=0, help="No end before that many tokens.", rich_help_panel=SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be repeated.", rich_help_panel=SAMPLING)
]
StopTokenId = Annotated[
    list[int] | None,
    typer.Option(min=0, help="End with this token; may be repeated.", rich_help_panel=SAMPLING),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end.", rich_help_panel=SAMPLING)]
Logprobs = Annotated[int | None, typer.Option(min=0, help="Top log-probabilities in --json.", rich_help_panel=SAMPLING)]
PromptLogprobs = Annotated[
    int | None,
    typer.Option(
        min=0, help="Log-probabilities of the prompt in --json, with as many top ones.", rich_help_panel=SAMPLING
    ),
]
Choices = Annotated[int | None, typer.Option("--n", min=1, help="So many answers.", rich_help_panel=SAMPLING)]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN=BIAS", help="Added to the logit of a token id; may be repeated.", rich_help_panel=SAMPLING
    ),
]
RequestCodec = Annotated[str, typer.Option("--codec", help="Of this request's KV; default: the cluster's.")]
RequestModel = Annotated[str, typer.Option("--model", help="Fails unless the cluster serves this one.")]
Timeout = Annotated[float | None, typer.Option(min=0.001, help="Give up after so many seconds.")]

JOBS_DB = Flag("gateway.jobs_db", ("--jobs-db",))
KEYS_FILE = Flag("gateway.access.keys_file", ("--keys-file",))
LOG_FORMAT = Flag("log_format", choices=True)

HttpPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Port of the HTTP API on the gateway's host; 0 picks a free one; default of `isthmus up`: "
        f"{defaults.HTTP_PORT}.",
    ),
]
NoHttp = Annotated[bool, typer.Option("--no-http", help="Answer no HTTP.")]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what memory it would take, read no weights, serve nothing.")
]

JobPriority = Annotated[str, typer.Option(help="interactive, standard, or batch, which yields to the others.")]


def logit_bias(values: list[str]) -> dict[int, float]:
    """Of TOKEN=BIAS; a mistake of the user where one is not that."""
    biases: dict[int, float] = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise typer.BadParameter(f"{value!r}; allowed: TOKEN=BIAS, as 42=-1.5", param_hint="--logit-bias") from None
    return biases


@asynccontextmanager
async def gateway_client(server: str) -> AsyncIterator["Client"]:
    """A client of the gateway at `server`, with the API key of the command line; errors as `transport_to`."""
    from ...client.client import Client

    async with transport_to(server) as transport, Client(server, transport, api_key=api_key()) as client:
        yield client


@asynccontextmanager
async def admin_of(address: str) -> AsyncIterator["ClusterAsyncStub"]:
    """Status and orders at the admin port `address`; errors as `transport_to`."""
    from ....proto.worker_pb2_grpc import ClusterStub
    from ...client.security import server_role

    async with (
        transport_to(address, "--admin") as transport,
        transport.dial(address, server_role(address)) as channel,
    ):
        yield ClusterStub(channel)


@asynccontextmanager
async def transport_to(server: str, option: str = "--server") -> AsyncIterator["Transport"]:
    """What to dial `server` with, by the options of `connection.py`; Unavailable, with what to do, where nobody answers
    there. `option` names the server's own."""
    import grpc.aio

    from ....proto.errors import Unavailable
    from ....proto.rpc.statuses import is_unreached, tls_problem
    from ....proto.rpc.transport import Transport
    from ...client.security import client_security

    address(server, to_dial=True, option=option)
    transport = Transport(client_security(server, certificates()))
    try:
        yield transport
    except grpc.aio.AioRpcError as error:
        if is_unreached(error):
            hint = f"start one with `isthmus up`, or name another with {option}"
            if (problem := tls_problem(error)) is not None:
                raise Unavailable(f"{server} answers, but {problem}") from None
            raise Unavailable(f"no gateway answers at {server}; {hint}") from None
        raise
    finally:
        await transport.close()


def address(text: str, *, to_dial: bool = False, for_others: bool = False, option: str | None = None) -> str:
    """The same; a mistake of the user, in `option`, where it is not host:port, or nobody can be dialled there."""
    from ....proto.rpc.addresses import checked_address

    try:
        return checked_address(text, to_dial=to_dial, for_others=for_others)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def address_to_dial(text: str) -> str:
    """The same; a mistake of the user where nobody can be dialled there."""
    return address(text, to_dial=True)


def address_for_others(text: str) -> str:
    """The same; a mistake of the user where no other host can dial it."""
    return address(text, for_others=True)


def configure_logs(level: str, settings: "ClusterConfig | None" = None, *, audit: bool = True) -> None:
    """Before anything imports gRPC, whose own lines on stderr (forks, ports) repeat what we say or help nobody; and
    again once the settings are read, which say in what form. `audit`: whether this process has something to audit."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from ...logs.configure import LEVELS
    from ...logs.configure import configure_logs as configure

    if level not in LEVELS:
        raise typer.BadParameter(f"log level {level!r}; allowed: {', '.join(LEVELS)}")
    if settings is None:
        configure(level)
    else:
        configure(level, settings.log_format, settings.audit_file if audit else None)


def say(line: str) -> None:
    """A line for the person who started the command."""
    print(line, file=sys.stderr, flush=True)
