"""`isthmus config show` and `schema`."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import options as opt
from .terminal.flags import command_with, default_text, given
from .up import UP_FLAGS

if TYPE_CHECKING:
    from ..config import Loaded, Role
    from ..sources import Setting

GATEWAY_PARTS = ("gateway", "host", "port", "model", "drain_s")
_PASSWORD = re.compile(r"(://[^:/@]+:)[^@]+@")


class Part(StrEnum):
    """Whose settings are shown."""

    gateway = "gateway"
    prefill = "prefill"
    decode = "decode"


config_app = typer.Typer(no_args_is_help=True, help="Show the settings that apply.", rich_markup_mode="rich")


@dataclass(frozen=True)
class Row:
    """One setting as it applies."""

    setting: str
    value: Any
    source: str = "default"  # or file, environment, flag
    name: str | None = None  # of the file, variable or option


@config_app.command("show", cls=command_with(UP_FLAGS))
def config_show(
    ctx: typer.Context,
    role: Annotated[Part | None, typer.Option(help="Only what this one reads, as a process of its own.")] = None,
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
) -> None:
    """Show each setting, its value and where it comes from: default, file, environment or flag.

    Flags are those of isthmus up.

    [bold]Examples[/]

      isthmus config show

      isthmus config show --config cluster.yaml --role decode

      ISTHMUS_GATEWAY__REPLAYS=3 isthmus config show --port 7000 --json
    """
    opt.configure_logs(opt.DEFAULT_LOG_LEVEL)
    from ..config import load

    loaded = load(config, given(ctx))
    rows = list(_rows(loaded, role))
    if as_json:
        print(json.dumps([vars(row) for row in rows]))
        return
    from .terminal.columns import print_lines, table_lines

    print_lines(
        table_lines(("setting", "source", "value"), [(row.setting, row.source, _text(row.value)) for row in rows])
    )
    for file in dict.fromkeys(row.name for row in rows if row.source == "file"):
        print(f"file: {file}")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the settings file, for editors and other programs.

    [bold]Examples[/]

      isthmus config schema > isthmus.schema.json
    """
    from ..config import ClusterConfig

    print(json.dumps(ClusterConfig.model_json_schema()))


def _rows(loaded: "Loaded", part: Part | None) -> "Iterator[Row]":
    """Of one part that is a process of its own, or of all that `isthmus up` reads."""
    from ..config import CONFIG_OF, ClusterConfig
    from ..launch.worker_thread import cores_for_one
    from ..sources import settings_of

    if part is Part.prefill or part is Part.decode:
        yield _row(loaded, "drain_s", ("drain_s",), loaded.config.drain_s)
        yield from _worker_rows(loaded, part.value, cores_for_one(), "")
        return
    config = loaded.config.with_jobs()
    for setting in settings_of(ClusterConfig):
        if setting[0] in GATEWAY_PARTS or (part is None and setting[0] not in ("prefill_worker", "decode_worker")):
            drawn = setting == ("cluster_id",) and setting not in loaded.origins
            yield _row(loaded, ".".join(setting), setting, None if drawn else config.value(setting))
    for role in CONFIG_OF if part is None else ():
        yield from _worker_rows(loaded, role, None, f"{role}_worker.")


def _worker_rows(loaded: "Loaded", role: "Role", threads: int | None, prefix: str) -> "Iterator[Row]":
    """What workers of a role read; where a setting of the whole cluster applies, with the source of that."""
    from ..config import CONFIG_OF

    settings = CONFIG_OF[role](**loaded.config.process_settings(role, default_threads=threads))
    places = loaded.config.set_for_workers(role)
    for name in CONFIG_OF[role].model_fields:
        yield _row(loaded, prefix + name, places.get(name, ()), getattr(settings, name))


def _row(loaded: "Loaded", name: str, setting: "Setting", value: Any) -> Row:
    from pydantic import BaseModel

    from ..access.settings import Limits

    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif isinstance(value, Mapping):  # limits of tenants are settings too
        value = {key: part.given if isinstance(part, Limits) else part for key, part in value.items()}
    elif isinstance(value, str):
        value = _PASSWORD.sub(r"\1***@", value)
    origin = loaded.origins.get(setting)
    return Row(name, value, origin.kind, origin.name) if origin else Row(name, value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={default_text(part) or part}" for key, part in value.items())
    if isinstance(value, tuple):
        return ",".join(value)
    return default_text(value) or ""
