"""The command line is what it was: commands, arguments, options and defaults, in `command_line.txt`.

Help texts are left out. After a wanted change: `python tests/cluster/cli/test_command_line.py` writes the file anew.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from isthmus.cluster.cli.main import app
from isthmus.cluster.gateway_config import GatewayConfig

FROZEN = Path(__file__).with_name("command_line.txt")
RENEW = "the command line has changed; if that is wanted: python tests/cluster/cli/test_command_line.py"


def described() -> str:
    """Each command, below it a line for each parameter: names, type, whether it repeats, variable, default."""
    return "".join(f"{line}\n" for line in _lines(typer.main.get_command(app), "isthmus"))


def _lines(command: Any, path: str) -> Iterator[str]:
    yield path
    context = command.context_class(command, info_name=path)
    parameters = [parameter for parameter in command.get_params(context) if parameter.name != "help"]
    yield from sorted(f"    {_parameter(parameter)}" for parameter in parameters)
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _lines(inner, f"{path} {name}")


def _parameter(parameter: Any) -> str:
    """Names, whether it takes a value, may be repeated or must be given; bounds, variable, default."""
    option = parameter.param_type_name == "option"
    names = "/".join([*parameter.opts, *parameter.secondary_opts]) if option else parameter.name.upper()
    value = "" if not option or parameter.is_flag else " VALUE"
    repeats = "..." if parameter.nargs == -1 or (option and parameter.multiple) else ""
    bounds = [None if bound is None else f"{bound:g}" for bound in (parameter.min, parameter.max)]
    default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    parts = [
        names + value + repeats,
        f"[{bounds[0] or ''}, {bounds[1] or ''}]" if any(bounds) else "",
        f"${parameter.envvar}" if parameter.envvar else "",
        "required" if parameter.required else "" if default in (None, False, "", ()) else f"= {default}",
    ]
    return " ".join(filter(None, parts))


def test_commands_options_and_defaults_are_the_frozen_ones() -> None:
    assert described().splitlines() == FROZEN.read_text().splitlines(), RENEW


def test_a_change_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "    --replays VALUE [0, ] = 16" in FROZEN.read_text().splitlines()
    monkeypatch.setattr(GatewayConfig.model_fields["replays"], "default", 17)
    assert "    --replays VALUE [0, ] = 17" in described().splitlines()


if __name__ == "__main__":
    FROZEN.write_text(described())
