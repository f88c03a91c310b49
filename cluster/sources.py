"""Where settings come from: flags win over the environment, that over the YAML file, that over defaults.

pydantic-settings reads the environment. The sources are put together here, because a mistake is told, and a setting
shown, with the source that it has.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from ..proto.errors import InvalidRequest

log = logging.getLogger(__name__)

PREFIX, DELIMITER = "ISTHMUS_", "__"

# Variables that are no settings of the file, or have a shorter name than its: what each is.
VARIABLES = {
    "ISTHMUS_CONFIG": "the settings file, where no --config is given",
    "ISTHMUS_JOBS_DB": "gateway.jobs_db",
    "ISTHMUS_SERVER": "the gateway that clients ask, where no --server is given",
    "ISTHMUS_API_KEY": "what clients show the gateway, where no --api-key is given",
    "ISTHMUS_PLAINTEXT_KEY": "whether clients may send it over a network in plain text",
    "ISTHMUS_ADMIN": "the admin port that status and orders go to, where no --admin is given",
    "ISTHMUS_CA": "the CAs that clients trust, where no --ca is given",
    "ISTHMUS_CERT": "the certificate that clients show, where no --cert is given",
    "ISTHMUS_KEY": "its private key, where no --key is given",
    "ISTHMUS_TLS__CA": "tls.ca",
    "ISTHMUS_TLS__CERT": "tls.cert",
    "ISTHMUS_TLS__KEY": "tls.key",
    "ISTHMUS_TLS__CLIENT_CERTIFICATES": "tls.client_certificates",
    "ISTHMUS_RUNTIME": "the folder of the sockets of this user's workers, mode 0700",
    "ISTHMUS_CACHE": "the folder of what can be made again: converted models, calibration, compiled kernels",
    "ISTHMUS_COMPILED": "auto or never: compiled kernels and CUDA graphs",
    "ISTHMUS_BF16": "auto or never: the bf16 units of a CPU",
    "ISTHMUS_DEBUG": "shows the trace of an internal error",
    "ISTHMUS_TEST_DB": "the database of tests and benchmarks",
}
# Kubernetes tells each pod of a Service called "isthmus" its addresses: ISTHMUS_PORT=tcp://10.0.0.1:50051 and more.
_OF_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)$")

Setting = tuple[str, ...]  # ("gateway", "replays")
Kind = Literal["file", "environment", "flag"]


@dataclass(frozen=True)
class Origin:
    """Where a value was set."""

    kind: Kind
    name: str  # the path of the file, the variable or the option


@dataclass(frozen=True)
class Given:
    """What was set, of a model's fields; sections are mappings in `values`."""

    values: dict[str, Any]
    origins: dict[Setting, Origin]


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Fields of a model that hold settings of their own."""
    types = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in types.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def read_sources(
    model: type[BaseModel], file: Path | None, flags: Mapping[str, Any], option_names: Mapping[str, str]
) -> Given:
    """What a file, the environment and flags (those that are not None) set of a model's fields. `option_names`: of
    options that are not named like their setting. InvalidRequest for a file that is not one of settings."""
    values: dict[str, Any] = {}
    origins: dict[Setting, Origin] = {}

    def put(setting: Setting, value: Any, origin: Origin) -> None:
        place = values
        for section in setting[:-1]:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):  # a mistake below, which is to be told
                return
        place[setting[-1]] = value
        origins[setting] = origin

    if file is not None:
        for setting, value in _settings(_read(file), model):
            put(setting, value, Origin("file", str(file)))
    for setting, value in _settings(_environment(model), model):
        put(setting, value, Origin("environment", _variable(setting)))
    for setting, value in _settings(flags, model):
        if value is not None:
            option = option_names.get(setting[-1], setting[-1]).replace("_", "-")
            put(setting, value, Origin("flag", f"--{option}"))
    return Given(values, origins)


def explain(
    error: ValidationError,
    model: type[BaseModel],
    origins: Mapping[Setting, Origin] | None = None,
    option_names: Mapping[str, str] | None = None,
) -> str:
    """All that is wrong with settings, in one line: each setting, its value, what is allowed, and where it was set."""
    keys = {option: key for key, option in (option_names or {}).items()}
    problems = []
    for item in error.errors():
        setting = tuple(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problem = _unknown(setting, model, keys)
        else:
            message = item["msg"].removeprefix("Value error, ")
            value, key = item["input"], ".".join(setting)
            given = f" is {value!r}" if isinstance(value, str | int | float) else ""
            problem = f"{key}{given}: {message}" if key else message
        names = _where(setting, origins or {})
        problems.append(f"{problem} (from {', '.join(names)})" if names else problem)
    return "; ".join(problems)


def warn_of_unknown_variables(model: type[BaseModel]) -> None:
    """Logs each variable ISTHMUS_... that sets nothing, with the nearest that does. Those of a section
    (ISTHMUS_GATEWAY__...) are left out: an unknown one of them is an error, as in a file."""
    settings = [setting[:end] for setting in settings_of(model) for end in range(1, len(setting) + 1)]
    known = {*VARIABLES, *map(_full_name, settings)}
    for name, value in sorted((variable.upper(), value) for variable, value in os.environ.items()):
        section, delimiter, _ = name.removeprefix(PREFIX).partition(DELIMITER)
        others = _OF_KUBERNETES.search(name) or _is_of_kubernetes(value)
        of_section = delimiter and section.lower() in sections(model)
        if name.startswith(PREFIX) and name not in known and not others and not of_section:
            nearest = get_close_matches(name, known, n=1, cutoff=0)[0]
            log.warning("the variable %s is unknown and sets nothing; the nearest known one is %s", name, nearest)


def settings_of(model: type[BaseModel]) -> Iterator[Setting]:
    """Every setting of a model and its sections."""
    nested = sections(model)
    for name in model.model_fields:
        if name in nested:
            yield from ((name, *below) for below in settings_of(nested[name]))
        else:
            yield (name,)


class _Environment(EnvSettingsSource):
    """A value that is not JSON stays text: the model has the last word on it."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


def _environment(model: type[BaseModel]) -> dict[str, Any]:
    source = _Environment(
        cast(Any, model),  # of a model only its fields are read
        case_sensitive=False,
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        env_ignore_empty=True,
    )
    values = {name: value for name, value in source().items() if not _is_of_kubernetes(value)}
    if jobs_db := os.environ.get("ISTHMUS_JOBS_DB"):
        values["gateway"] = {"jobs_db": jobs_db, **values.get("gateway", {})}
    return values


def _is_of_kubernetes(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("tcp://", "udp://"))


def _full_name(setting: Setting) -> str:
    return PREFIX + DELIMITER.join(setting).upper()


def _variable(setting: Setting) -> str:
    """The variable that sets it: its own, that of its section, which is JSON then, or a short one."""
    there = {name.upper() for name in os.environ}
    names = [_full_name(setting[:end]) for end in range(len(setting), 0, -1)]
    return next((name for name in names if name in there), "ISTHMUS_JOBS_DB")


def _settings(values: Mapping[str, Any], model: type[BaseModel], above: Setting = ()) -> Iterator[tuple[Setting, Any]]:
    """Each setting that is in `values`, nested as sections are. A section that is empty sets nothing."""
    nested = sections(model)
    for name, value in values.items():
        if name in nested and isinstance(value, Mapping):
            yield from _settings(value, nested[name], (*above, name))
        elif name not in nested or value is not None:
            yield (*above, str(name)), value


def _unknown(setting: Setting, model: type[BaseModel], keys: Mapping[str, str]) -> str:
    """`keys`: of options that are not named like their setting."""
    *path, key = setting
    if not path and (owners := [name for name, owner in sections(model).items() if key in owner.model_fields]):
        return f"key {key!r} belongs under {' or '.join(f'{owner}:' for owner in owners)}"
    where = f"{'.'.join(path)}: " if path else ""
    known = _model_at(model, path).model_fields
    nearest = [keys[key]] if keys.get(key) in known else get_close_matches(key, known, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{where}unknown key {key!r}{hint}; allowed: {', '.join(known)}"


def _model_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The model of a section, or of an entry of a mapping to models."""
    names = iter(path)
    for name in names:
        annotation = model.model_fields[name].annotation
        if get_origin(annotation) is dict:
            next(names)
            annotation = get_args(annotation)[1]
        model = cast(type[BaseModel], annotation)
    return model


def _where(setting: Setting, origins: Mapping[Setting, Origin]) -> list[str]:
    """The sources of a setting, of what it is part of, or of all that is in it."""
    for end in range(len(setting), 0, -1):
        if setting[:end] in origins:
            return [origins[setting[:end]].name]
    return list(dict.fromkeys(origin.name for each, origin in origins.items() if each[: len(setting)] == setting))


def _read(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InvalidRequest(f"{file} is not YAML: {problem}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise InvalidRequest(f"{file} is not a mapping of settings")
    return loaded
