"""The chart rendered by Helm, once for each set of values; nothing is fetched or installed."""

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from .tools import program

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "prod", "models"

Object = dict[str, Any]


def name_of(values: Path) -> str:
    """What a file of values is for."""
    return values.name.removesuffix("-values.yaml")


def values_of(name: str) -> Path:
    return CHART / "ci" / f"{name}-values.yaml"


def helm(*arguments: str, version: str = "helm") -> "subprocess.CompletedProcess[str]":
    """Runs Helm 4, or the one named. Skips the test where it was not fetched."""
    file = program(version)
    if file is None:
        pytest.skip(f"NOT TESTED: {version} is not here; `make .venv/.helm` fetches it")
    return subprocess.run([str(file), *arguments], capture_output=True, text=True, check=False, timeout=60)


@cache
def rendered_text(*arguments: str, version: str = "helm", release: str = RELEASE) -> str:
    """What `helm template` prints with these arguments. AssertionError where it fails."""
    done = helm("template", release, str(CHART), "--namespace", NAMESPACE, *arguments, version=version)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(*arguments: str, version: str = "helm", release: str = RELEASE) -> list[Object]:
    """The objects, each time new ones."""
    text = rendered_text(*arguments, version=version, release=release)
    return [found for found in yaml.load_all(text, Loader=_LOADER) if found]


def rendered_case(name: str, version: str = "helm") -> list[Object]:
    """Those of one of the chart's files of values."""
    return rendered("--values", str(values_of(name)), version=version)


def refusal(*arguments: str) -> str:
    """What Helm says to values that are refused. AssertionError where it takes them."""
    done = helm("template", RELEASE, str(CHART), *arguments)
    assert done.returncode != 0, "these values were taken"
    return done.stderr


def only(objects: list[Object], kind: str, suffix: str = "") -> Object:
    """The one object of a kind whose name ends so."""
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(suffix))
    return found


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
