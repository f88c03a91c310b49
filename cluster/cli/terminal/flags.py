"""Options that are settings: type, limits, default and help come from the field (`cluster/config.py`).

The fields are looked up when a command is parsed or its help is shown: no other command waits for pydantic.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
import typer.main
from typer.core import TyperCommand

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_META = "isthmus.flags"


@dataclass(frozen=True)
class Flag:
    """An option that sets one setting."""

    setting: str  # with its section: gateway.replays
    names: tuple[str, ...] = ()  # default: that of the setting, with --no- for what is on by default
    panel: str | None = None  # of the help
    choices: bool = False  # whether a value that is not one of the setting's is an error of usage
    parse: Callable[[Any], Any] | None = None  # from what was given to the value; typer.BadParameter

    @property
    def key(self) -> str:
        """The setting as a Python name."""
        return self.setting.replace(".", "_")


def command_with(flags: Sequence[Flag]) -> type[TyperCommand]:
    """The class of a command that has these options before its own; `given` has their values."""

    class WithFlags(TyperCommand):
        """Builds the options when they are first asked for."""

        _options: list[Any] | None = None

        def get_params(self, ctx: Any) -> list[Any]:
            if self._options is None:
                self._options = _options_of(flags)
            return [*self._options, *super().get_params(ctx)]

        def invoke(self, ctx: Any) -> Any:
            values: dict[str, Any] = {}
            for flag in flags:
                value = ctx.params.pop(flag.key)
                if value is not None and value != ():
                    *sections, name = flag.setting.split(".")
                    place = values
                    for section in sections:
                        place = place.setdefault(section, {})
                    place[name] = flag.parse(value) if flag.parse else value
            ctx.meta[_META] = values
            return super().invoke(ctx)

    return WithFlags


def given(ctx: typer.Context) -> dict[str, Any]:
    """What the options of a command set, nested as in the settings file."""
    return ctx.meta[_META]


def field_of(setting: str) -> "FieldInfo":
    """The field of the settings file."""
    from ...config import ClusterConfig
    from ...sources import sections

    model: Any = ClusterConfig
    *path, name = setting.split(".")
    for section in path:
        model = sections(model)[section]
    return model.model_fields[name]


def default_text(default: Any) -> str | None:
    """How help shows a default; None for one that only the description can tell."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, float):
        return f"{default:g}"
    return str(default) if isinstance(default, str | int) else None


def _options_of(flags: Sequence[Flag]) -> list[Any]:
    """As Typer makes them for a function with these parameters."""

    def command(**values: Any) -> None:
        pass

    parameters = [
        inspect.Parameter(flag.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(flag))
        for flag in flags
    ]
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return list(typer.main.get_command(app).params)


def _annotation(flag: Flag) -> Any:
    field = field_of(flag.setting)
    kind = _kind(field.annotation, choices=flag.choices)
    name = flag.setting.rpartition(".")[2]
    option = f"--{name.replace('_', '-')}"
    if kind is bool and field.default:
        option = f"{option}/--no-{option[2:]}"
    return Annotated[
        kind | None,
        typer.Option(
            *(flag.names or (option,)),
            help=field.description,
            show_default=default_text(field.default) or False,
            metavar=_metavar(name, kind),
            rich_help_panel=flag.panel,
            **_limits(field),
        ),
    ]


def _kind(annotation: Any, *, choices: bool) -> Any:
    """The type of an option for a field of this type."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is Literal:
        return annotation if choices else str
    return list[str] if get_origin(annotation) in (tuple, dict) else annotation


def _metavar(name: str, kind: Any) -> str | None:
    units = {"s": "S", "mib": "MIB", "gib": "GIB"}
    return units.get(name.rpartition("_")[2], "N") if kind in (int, float) else None


def _limits(field: "FieldInfo") -> dict[str, Any]:
    """Bounds of a number. What must be more than a bound, and is that bound, is refused by the field itself."""
    limits: dict[str, Any] = {}
    for bound in field.metadata:
        for limit, names in {"min": ("ge", "gt"), "max": ("le", "lt")}.items():
            for name in names:
                if (value := getattr(bound, name, None)) is not None:
                    limits[limit] = value
    return limits
