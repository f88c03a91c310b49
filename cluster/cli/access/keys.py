"""`isthmus keys add|list|revoke`: the API keys of a gateway's file."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..terminal import options as opt
from ..terminal.flags import command_with, given

if TYPE_CHECKING:
    from ...access.settings import Limits

keys_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="API keys: who may ask a gateway, and how much."
)
LIMITS = "Limits"
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
KeysCommand = command_with((opt.KEYS_FILE,))


@keys_app.command("add", cls=KeysCommand)
def keys_add(
    ctx: typer.Context,
    tenant: Annotated[str, typer.Option(help="Whose key it is: its requests, jobs and cached pages.")],
    name: Annotated[str, typer.Option(help="A note for you.")] = "",
    expires: Annotated[str | None, typer.Option(help="In 12h or 90d, or at 2027-01-31T12:00Z.")] = None,
    weight: Annotated[float | None, typer.Option(help="Share while others wait.", rich_help_panel=LIMITS)] = None,
    max_priority: Annotated[
        str | None, typer.Option(help="interactive, standard or batch.", rich_help_panel=LIMITS)
    ] = None,
    requests_per_min: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute.", rich_help_panel=LIMITS)
    ] = None,
    tokens_per_min: Annotated[
        int | None, typer.Option(min=1, help="Tokens a minute, of prompts and outputs.", rich_help_panel=LIMITS)
    ] = None,
    running: Annotated[int | None, typer.Option(min=1, help="Requests at once.", rich_help_panel=LIMITS)] = None,
    max_request_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of one request.", rich_help_panel=LIMITS)
    ] = None,
    max_request_kv_mib: Annotated[
        float | None, typer.Option(help="KV of one request, in MiB.", rich_help_panel=LIMITS)
    ] = None,
    max_request_s: Annotated[float | None, typer.Option(help="Seconds of one request.", rich_help_panel=LIMITS)] = None,
    config: opt.ConfigFile = None,
) -> None:
    """Make a key, add it to the file and print it. It is shown this once; the file has only a hash of it.

    Gateways read the file anew within a second. Limits are for each key by itself; default: none.

    [bold]Examples[/]

      isthmus keys add --keys-file keys.json --tenant research > research.key

      isthmus keys add --keys-file keys.json --tenant web --expires 90d --requests-per-min 600 --max-priority standard

      isthmus keys add --config cluster.yaml --tenant batch --max-priority batch --tokens-per-min 1000000
    """
    from ...access.key_file import KeyDocument, change
    from ...access.keys import new_key

    path = _file(ctx, config)
    asked = {
        "weight": weight,
        "max_priority": max_priority,
        "requests_per_min": requests_per_min,
        "tokens_per_min": tokens_per_min,
        "running": running,
        "max_request_tokens": max_request_tokens,
        "max_request_kv_mib": max_request_kv_mib,
        "max_request_s": max_request_s,
    }
    key, record = _checked(new_key, tenant=tenant, name=name, limits=_limits(asked), expires=_expiry(expires))
    change(path, lambda document: KeyDocument(keys=(*document.keys, record)))
    opt.say(f"key {record.id} of tenant {tenant} is in {path}; this is shown once:")
    print(key)


@keys_app.command("list", cls=KeysCommand)
def keys_list(ctx: typer.Context, config: opt.ConfigFile = None, as_json: opt.Json = False) -> None:
    """List the keys of the file: id, tenant, state, limits. A key itself is nowhere.

    [bold]Examples[/]

      isthmus keys list --keys-file keys.json

      isthmus keys list --config cluster.yaml --json
    """
    from ...access.key_file import read

    path, now = _existing(_file(ctx, config)), datetime.now(UTC)
    rows = [
        {
            "id": record.id,
            "tenant": record.tenant,
            "name": record.name,
            "state": record.state(now),
            "created": record.created.isoformat(),
            "expires": record.expires.isoformat() if record.expires else None,
            "revoked": record.revoked.isoformat() if record.revoked else None,
            "limits": record.limits.given,
        }
        for record in read(path).keys
    ]
    if as_json:
        print(json.dumps(rows))
        return
    from ..terminal.columns import print_lines, table_lines

    if not rows:
        opt.say(f"{path} has no keys: nobody is let in")
    shown = [
        (
            *(row[name] for name in ("id", "tenant", "state", "created")),
            row["expires"] or "never",
            ",".join(f"{name}={value}" for name, value in row["limits"].items()) or "none",
            row["name"],
        )
        for row in rows
    ]
    print_lines(table_lines(("key", "tenant", "state", "created", "expires", "limits", "name"), shown))


@keys_app.command("revoke", cls=KeysCommand)
def keys_revoke(
    ctx: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As `isthmus keys list` shows them.")],
    config: opt.ConfigFile = None,
) -> None:
    """Let keys in no more: within a second at every gateway that reads the file. Requests that run go on to their end.

    [bold]Examples[/]

      isthmus keys revoke --keys-file keys.json 1f3a5c7e90b2d4f6
    """
    from ....proto.errors import NotFound, shown
    from ...access.key_file import KeyDocument, change

    now = datetime.now(UTC).replace(microsecond=0)

    def revoke(document: KeyDocument) -> KeyDocument:
        known = {record.id for record in document.keys}
        if missing := [key_id for key_id in ids if key_id not in known]:
            raise NotFound(f"no key {', '.join(map(shown, missing))} in the file; nothing was changed")
        changed = (
            record.model_copy(update={"revoked": now}) if record.id in ids and record.revoked is None else record
            for record in document.keys
        )
        return KeyDocument(keys=tuple(changed))

    change(_existing(_file(ctx, config)), revoke)
    for key_id in dict.fromkeys(ids):
        print(f"{key_id} is revoked")


def _file(ctx: typer.Context, config: Path | None) -> Path:
    """The file of the settings; a mistake of usage where there is none."""
    opt.configure_logs(opt.DEFAULT_LOG_LEVEL)
    from ...config import load_config

    found = load_config(config, given(ctx)).gateway.access.keys_file
    if found is None:
        raise typer.BadParameter("which file? Name it with --keys-file, or as gateway.access.keys_file in the settings")
    return Path(found)


def _existing(path: Path) -> Path:
    """The same; NotFound where there is no such file."""
    from ....proto.errors import NotFound

    if not path.exists():
        raise NotFound(f"there is no file {path}: isthmus keys add --keys-file {path} --tenant NAME makes it")
    return path


def _limits(asked: dict[str, Any]) -> "Limits":
    from ...access.settings import Limits

    return _checked(Limits, **{name: value for name, value in asked.items() if value is not None})


def _checked(make: Any, **values: Any) -> Any:
    """What `make` makes of these values; a mistake of usage where they are not such as a file of keys has."""
    from pydantic import ValidationError

    from ...access.settings import Limits
    from ...sources import explain

    try:
        return make(**values)
    except ValidationError as error:
        raise typer.BadParameter(explain(error, Limits)) from None


def _expiry(text: str | None) -> datetime | None:
    """A time to come, said as one, or as how long from now."""
    if text is None:
        return None
    now = datetime.now(UTC).replace(microsecond=0)
    if found := re.fullmatch(r"(\d{1,6})([smhd])", text):
        return now + timedelta(seconds=int(found[1]) * _UNITS_S[found[2]])
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time; allowed: 90d, 12h, 2027-01-31T12:00Z") from None
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    if time <= now:
        raise typer.BadParameter(f"{text} is over already")
    return time
