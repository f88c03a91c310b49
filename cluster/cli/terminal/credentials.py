"""Options of the commands that call a gateway's client port: what they show it."""

from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand

if TYPE_CHECKING:
    from ...client.credentials import ApiKey

_given: ContextVar[tuple[str | None, bool]] = ContextVar("given", default=(None, False))


class ClientCommand(TyperCommand):
    """A command that calls the client port; `api_key` has what was given."""

    def get_params(self, ctx: Any) -> list[Any]:
        *own, helping = super().get_params(ctx)
        return [*own, *_key_options(), helping]

    def invoke(self, ctx: Any) -> Any:
        _given.set((ctx.params.pop("api_key"), ctx.params.pop("plaintext_key")))
        return super().invoke(ctx)


@cache
def _key_options() -> tuple[Any, ...]:
    """As Typer makes them for a function with these parameters."""

    def command(
        api_key: Annotated[
            str | None,
            typer.Option(
                envvar="ISTHMUS_API_KEY",
                metavar="KEY|@FILE",
                help="Who you are; other users of this host see what stands here, but no variable and no file.",
            ),
        ] = None,
        plaintext_key: Annotated[
            bool,
            typer.Option(
                "--plaintext-key",
                envvar="ISTHMUS_PLAINTEXT_KEY",
                help="Send it over a network in plain text too.",
            ),
        ] = False,
    ) -> None:
        pass

    app = typer.Typer(add_completion=False)
    app.command()(command)
    return tuple(typer.main.get_command(app).params)


def api_key() -> "ApiKey | None":
    """The key of the command that runs; None without one."""
    from ...client.credentials import ApiKey

    text, over_plaintext = _given.get()
    if not text:
        return None
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise typer.BadParameter("the file of the API key cannot be read as text", param_hint="--api-key") from None
    return ApiKey(text, over_plaintext=over_plaintext)
