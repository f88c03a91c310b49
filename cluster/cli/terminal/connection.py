"""Options by which commands that call a server say whom they trust and who they are. The same for all of them, so they
are not in their signatures: `cls=ClientCommand` and `cls=AdminCommand` add them."""

import inspect
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand

if TYPE_CHECKING:
    from ...client.credentials import ApiKey
    from ...client.security import Certificates

_PANEL = "Connection"
_FILES = {
    "ca": "CAs to trust, a PEM file; default: those of a cluster of this user on this machine.",
    "cert": "Certificate to show where the server asks for one, a PEM file.",
    "key": "Its private key, a PEM file.",
}
_given: ContextVar[dict[str, Any] | None] = ContextVar("connection", default=None)


class AdminCommand(TyperCommand):
    """A command that calls an admin port. Its options are built when they are first asked for."""

    _connection: list[Any] | None = None

    def get_params(self, ctx: Any) -> list[Any]:
        if self._connection is None:
            self._connection = _options(self._annotations())
        *own, help_option = super().get_params(ctx)
        return [*own, *self._connection, help_option]

    def invoke(self, ctx: Any) -> Any:
        before = _given.set({name: ctx.params.pop(name) for name in self._annotations()})
        try:
            return super().invoke(ctx)
        finally:
            _given.reset(before)

    def _annotations(self) -> dict[str, Any]:
        return {name: _file(name, text) for name, text in _FILES.items()}


class ClientCommand(AdminCommand):
    """A command that calls a gateway's port for clients, which may ask for an API key."""

    def _annotations(self) -> dict[str, Any]:
        return {**super()._annotations(), "api_key": _API_KEY, "plaintext_key": _PLAINTEXT}


def certificates() -> "Certificates":
    """What the command that runs was given."""
    from ...client.security import Certificates

    given = _given.get() or {}
    return Certificates(**{name: given.get(name) for name in _FILES})


def api_key() -> "ApiKey | None":
    """The key of the command that runs; None without one."""
    from ...client.credentials import ApiKey

    given = _given.get() or {}
    if not (text := given.get("api_key")):
        return None
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise typer.BadParameter("the file of the API key cannot be read as text", param_hint="--api-key") from None
    return ApiKey(text, over_plaintext=given["plaintext_key"])


def _options(annotations: dict[str, Any]) -> list[Any]:
    """As Typer makes them for a function with these parameters."""

    def command(**values: Any) -> None:
        pass

    parameters = [
        inspect.Parameter(
            *(name, inspect.Parameter.KEYWORD_ONLY),
            default=False if annotation is _PLAINTEXT else None,
            annotation=annotation,
        )
        for name, annotation in annotations.items()
    ]
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return list(typer.main.get_command(app).params)


def _file(name: str, text: str) -> Any:
    option = typer.Option(
        f"--{name}", envvar=f"ISTHMUS_{name.upper()}", exists=True, dir_okay=False, help=text, rich_help_panel=_PANEL
    )
    return Annotated[Path | None, option]


_API_KEY = Annotated[
    str | None,
    typer.Option(
        envvar="ISTHMUS_API_KEY",
        metavar="KEY|@FILE",
        help="Who you are; other users of this host see what stands here, but no variable and no file.",
        rich_help_panel=_PANEL,
    ),
]
_PLAINTEXT = Annotated[
    bool,
    typer.Option(
        "--plaintext-key",
        envvar="ISTHMUS_PLAINTEXT_KEY",
        help="Send it over a network in plain text too.",
        rich_help_panel=_PANEL,
    ),
]
