"""Options by which client commands say whom they trust and who they are. The same for all of them, so they are not in
their signatures: `cls=ClientCommand` adds them, `certificates` has their values."""

import inspect
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand

if TYPE_CHECKING:
    from ...client.security import Certificates

_PANEL = "Connection"
_OPTIONS = {
    "ca": "CAs to trust, a PEM file; default: those of a cluster of this user on this machine.",
    "cert": "Certificate to show where the server asks for one, a PEM file.",
    "key": "Its private key, a PEM file.",
}
_given: ContextVar[dict[str, Path | None] | None] = ContextVar("certificates", default=None)


class ClientCommand(TyperCommand):
    """A command that calls a gateway. Its options are built when they are first asked for."""

    _connection: list[Any] | None = None

    def get_params(self, ctx: Any) -> list[Any]:
        if self._connection is None:
            self._connection = _options()
        *own, help_option = super().get_params(ctx)
        return [*own, *self._connection, help_option]

    def invoke(self, ctx: Any) -> Any:
        before = _given.set({name: ctx.params.pop(name) for name in _OPTIONS})
        try:
            return super().invoke(ctx)
        finally:
            _given.reset(before)


def certificates() -> "Certificates":
    """What the command that runs was given."""
    from ...client.security import Certificates

    return Certificates(**(_given.get() or {}))


def _options() -> list[Any]:
    """As Typer makes them for a function with these parameters."""

    def command(**values: Any) -> None:
        pass

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, text))
        for name, text in _OPTIONS.items()
    ]
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return list(typer.main.get_command(app).params)


def _annotation(name: str, text: str) -> Any:
    option = typer.Option(
        f"--{name}", envvar=f"ISTHMUS_{name.upper()}", exists=True, dir_okay=False, help=text, rich_help_panel=_PANEL
    )
    return Annotated[Path | None, option]
