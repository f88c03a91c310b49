"""The command `isthmus`: its commands, and how every one of them ends.

Exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted. An error is one line on stderr, with the name
of its gRPC status. Commands import what they need when they run, so that `--help` is fast.
"""

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from typer.exceptions import TyperException

from . import calibrate, config, explain, gateway, generate, operate, status, supervise, up, worker
from .access import certs, keys
from .files import models, store
from .jobs import batch, jobs
from .terminal.connection import AdminCommand, ClientCommand
from .terminal.lines import say

INTERRUPTED = 130

app = typer.Typer(
    name="isthmus",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Disaggregated prefill/decode inference: compressed KV pages over gRPC.",
    epilog="Start with [bold]isthmus demo[/], or [bold]isthmus up[/] and then [bold]isthmus generate[/].",
)
app.command("up", cls=up.UpCommand)(up.up)
app.command("generate", cls=ClientCommand)(generate.generate)
app.command("chat", cls=ClientCommand)(generate.chat)
app.command("status", cls=AdminCommand)(status.status)
app.command("explain", cls=AdminCommand)(explain.explain)
app.command("drain", cls=AdminCommand)(operate.drain)
app.command("flip", cls=AdminCommand)(operate.flip)
app.command("scale", cls=AdminCommand)(operate.scale)
app.add_typer(models.models_app, name="models")
app.add_typer(store.store_app, name="store")
app.command("calibrate", cls=calibrate.CalibrateCommand)(calibrate.calibrate)
app.command("demo", cls=up.DemoCommand)(up.demo)
app.add_typer(jobs.jobs_app, name="jobs")
app.add_typer(batch.batch_app, name="batch")
app.add_typer(worker.worker_app, name="worker")
app.command("gateway", cls=gateway.GatewayCommand)(gateway.gateway)
app.command("supervise", cls=supervise.SuperviseCommand)(supervise.supervise)
app.add_typer(config.config_app, name="config")
app.add_typer(keys.keys_app, name="keys")
app.add_typer(certs.certs_app, name="certs")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"isthmus {version('isthmus')}")
        raise typer.Exit


@app.callback()
def _options(
    shown: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def run(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    # Before anything imports gRPC: its own lines on stderr (forks, ports, handshakes) repeat what we say
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        code = app(arguments, prog_name="isthmus", standalone_mode=False)
    except TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains of it at exit
        return 1
    except Exception as error:
        return _fail(_line_of(error), 1)
    return code if isinstance(code, int) else 0


def _line_of(error: Exception) -> str:
    """How an error is shown to a user. A bug raises again where ISTHMUS_DEBUG asks for its trace."""
    from .terminal.errors import line_of

    line = line_of(error)
    if line is None and os.environ.get("ISTHMUS_DEBUG"):
        raise error
    return line or f"internal error: {type(error).__name__}: {error} (ISTHMUS_DEBUG=1 shows where)"


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    say(f"error: {line}", logging.ERROR)
    return code
