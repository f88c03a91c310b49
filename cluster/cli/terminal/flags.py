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
    help: str | None = None  # where the setting's own description does not hold for the command

    @property
    def key(self) -> str:
        """The setting as a Python name."""
        return self.setting.replace(".", "_")

    @property
    def option(self) -> str:
        """Its long name."""
        return self.names[0] if self.names else f"--{self.setting.rpartition('.')[2].replace('_', '-')}"


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
                source = ctx.get_parameter_source(flag.key)
                value = ctx.params.pop(flag.key)
                if source is not None and source.name != "DEFAULT" and value is not None and value != ():
                    *sections, name = flag.setting.split(".")
                    place = values
                    for section in sections:
                        place = place.setdefault(section, {})
                    place[name] = _parsed(flag, value)
            ctx.meta[_META] = values
            return super().invoke(ctx)

    return WithFlags


def _parsed(flag: Flag, value: Any) -> Any:
    """As a setting; typer.BadParameter, which names the option, where it is none."""
    if (above := _exclusive_minimum(field_of(flag.setting))) is not None and not value > above:
        raise typer.BadParameter(f"{value} is not in the range x>{above:g}.", param_hint=flag.option)
    try:
        return flag.parse(value) if flag.parse else value
    except typer.BadParameter as error:
        error.param_hint = flag.option
        raise


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

    by_name = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(flag.key, by_name, default=_default(flag), annotation=_annotation(flag)) for flag in flags
    ]
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return list(typer.main.get_command(app).params)


def _default(flag: Flag) -> Any:
    """For the help alone, where a description cannot tell it better: `given` has no defaults."""
    default = field_of(flag.setting).default
    if default_text(default) is None:
        return None
    return int(default) if isinstance(default, float) and default.is_integer() else default


def _annotation(flag: Flag) -> Any:
    field = field_of(flag.setting)
    kind = _kind(field.annotation, choices=flag.choices)
    option = flag.option
    if kind is bool and field.default:
        option = f"{option}/--no-{option[2:]}"
    return Annotated[
        kind | None,
        typer.Option(
            *(flag.names or (option,)),
            help=flag.help or field.description,
            show_default=default_text(field.default) is not None,
            metavar=_metavar(flag.setting, kind, field),
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


def _metavar(setting: str, kind: Any, field: "FieldInfo") -> str | None:
    if kind not in (int, float):
        return None
    unit = {"s": "S", "mib": "MIB", "gib": "GIB"}.get(setting.rpartition("_")[2], "N")
    above = _exclusive_minimum(field)
    return unit if above is None else f"{unit} [x>{above:g}]"


def _exclusive_minimum(field: "FieldInfo") -> float | None:
    """What a value must be more than. Typer knows bounds that are values themselves only."""
    return next((bound.gt for bound in field.metadata if getattr(bound, "gt", None) is not None), None)


def _limits(field: "FieldInfo") -> dict[str, Any]:
    """Bounds of a number that are values themselves."""
    limits: dict[str, Any] = {}
    for bound in field.metadata:
        for limit, name in {"min": "ge", "max": "le"}.items():
            if (value := getattr(bound, name, None)) is not None:
                limits[limit] = value
    return limits
