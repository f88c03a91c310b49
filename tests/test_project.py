"""The project's own files agree: one version, one list of checks, tools that are pinned."""

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml

from isthmus.cluster.cli.main import run
from isthmus.proto.rpc.transport import Transport
from isthmus.worker.server import WorkerServer

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert metadata("isthmus")["Version"] == PROJECT["version"]
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"isthmus {PROJECT['version']}\n"


def test_a_worker_reports_the_version() -> None:
    assert WorkerServer(1, "127.0.0.1:0", None, "one", Transport()).report().version == PROJECT["version"]


def test_no_code_spells_the_version() -> None:
    folders = ("benchmarks", "cluster", "decode", "kernels", "kvtransfer", "model", "prefill", "proto", "worker")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in files if f'"{PROJECT["version"]}"' in path.read_text()] == []


def test_the_changelog_knows_the_version() -> None:
    released = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[:2] == ["Unreleased", PROJECT["version"]]


def test_the_licence_is_declared() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert metadata("isthmus")["License-Expression"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "Copyright 2026 The isthmus authors" in text


def test_hooks_run_what_make_lint_runs() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    linted = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == linted


def test_ci_runs_every_suite() -> None:
    targets = set(re.findall(r"^(test[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    run = set(re.findall(r"\b(?:make|at_once|possible tests/[\w-]+) (test[\w-]*)", (ROOT / ".ci" / "run").read_text()))
    of_others = {"test-unit", "test-integration", "test-lanes"}  # parts of `make test`; both lanes at once
    assert run == targets - of_others


def test_tools_are_pinned() -> None:
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints-cpu.txt").read_text(), re.MULTILINE))
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    wanted = (*PROJECT["dependencies"], *extras)
    names = {re.split(r"[\[<>=~ ]", requirement)[0] for requirement in wanted}
    unpinned = {_normal(name) for name in names} - {_normal(name) for name in pinned}
    assert unpinned == {"isthmus", "triton", "setuptools"}  # the project, what torch decides, what builds it


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
