"""Options that several commands share, and what they do with them."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ....model import dtypes

if TYPE_CHECKING:
    from ....proto.rpc.transport import Transport
    from ...client.client import Client

SAMPLING, CLUSTER = "Sampling", "Cluster"

Server = Annotated[
    str,
    typer.Option("--server", "-s", envvar="ISTHMUS_SERVER", help="host:port of the gateway.", show_default=True),
]
DEFAULT_SERVER = "127.0.0.1:50051"

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error; JSON lines on stderr.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", exists=True, dir_okay=False, help="YAML file of settings; flags win over it."),
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
RequestCodec = Annotated[str, typer.Option("--codec", help="Of this request's KV; default: the cluster's.")]
RequestModel = Annotated[str, typer.Option("--model", help="Fails unless the cluster serves this one.")]
Timeout = Annotated[float | None, typer.Option(min=0.001, help="Give up after so many seconds.")]

ModelSource = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Name (isthmus models), folder, .gguf file or hub id.",
        show_default="smollm2-135m",
    ),
]
Dtype = Annotated[
    dtypes.Dtype | None,
    typer.Option(
        help="Of weights; auto: what the device is fast at; float16: GPUs only.",
        show_default="auto",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or auto.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of torch in each worker; default: cores / workers.")]

WorkerThreads = Annotated[
    int | None, typer.Option(min=1, help="Of torch; default: all cores, too many where workers share a host.")
]

StoreDir = Annotated[
    str | None,
    typer.Option("--store-dir", help="Folder where prefill workers keep KV pages on disk.", show_default="none"),
]
StoreGib = Annotated[
    float | None, typer.Option("--store-gib", min=0.001, help="Size of that folder, at most.", show_default="10")
]

JobsDb = Annotated[
    str | None,
    typer.Option(
        "--jobs-db",
        metavar="URL",
        help="Database of jobs (ISTHMUS_JOBS_DB); none: no jobs.",
        show_default="jobs.db in ~/.local/state/isthmus",
    ),
]

WorkerCodec = Annotated[str | None, typer.Option("--codec", help="The default one.", show_default="tq-k4v4")]
WorkerName = Annotated[str | None, typer.Option(help="Of this worker in status; default: role, host and port.")]
WorkerListen = Annotated[
    str | None, typer.Option(help="host:port; port 0 picks a free one; [::]:7001 is IPv6.", show_default="127.0.0.1:0")
]
Advertise = Annotated[
    str | None,
    typer.Option(help="host:port that others shall use; default: as bound, or of the interface that routes outward."),
]
WorkerDrain = Annotated[
    float, typer.Option("--drain-s", min=0, help="For running requests when it stops; those left go on elsewhere.")
]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what memory it would take, read no weights, serve nothing.")
]

JobPriority = Annotated[str, typer.Option(help="interactive, standard, or batch, which yields to the others.")]


@asynccontextmanager
async def gateway_client(server: str) -> AsyncIterator["Client"]:
    """A client of the gateway at `server`; errors as `transport_to`."""
    from ...client.client import Client

    async with transport_to(server) as transport, Client(server, transport) as client:
        yield client


@asynccontextmanager
async def transport_to(server: str) -> AsyncIterator["Transport"]:
    """What to dial `server` with; Unavailable, with what to do, where nobody answers there."""
    import grpc.aio

    from ....proto.errors import Unavailable
    from ....proto.rpc.statuses import is_unreached
    from ....proto.rpc.transport import Transport

    check_address(server, to_dial=True)
    transport = Transport()
    try:
        yield transport
    except grpc.aio.AioRpcError as error:
        if is_unreached(error):
            hint = "start one with `isthmus up`, or name another with --server"
            raise Unavailable(f"no gateway answers at {server}; {hint}") from None
        raise
    finally:
        await transport.close()


def check_address(address: str, *, to_dial: bool = False) -> None:
    """A mistake of the user where it is not host:port."""
    from ....proto.rpc.addresses import checked_address

    try:
        checked_address(address, to_dial=to_dial)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def configure_logs(level: str) -> None:
    """Before anything imports gRPC, whose own lines on stderr (forks, ports) repeat what we say or help nobody."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from .logs import LEVELS
    from .logs import configure_logs as configure

    if level not in LEVELS:
        raise typer.BadParameter(f"log level {level!r}; allowed: {', '.join(LEVELS)}")
    configure(level)


def say(line: str) -> None:
    """A line for the person who started the command."""
    print(line, file=sys.stderr, flush=True)
