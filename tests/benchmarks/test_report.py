"""Benchmarks say what they are at without a terminal, and keep the figures of a run that is stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.report import Report, each

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@contextmanager
def router_benchmark(out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`benchmarks/router.py`, which needs neither workers nor a model, with its stderr in a pipe."""
    command = [sys.executable, str(BENCHMARKS / "router.py"), "--json", str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_benchmark_that_is_stopped_half_way_leaves_what_is_done(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "router.json"
    with router_benchmark(out, "--seconds", "3600", "--idle", "0") as process:
        assert process.stderr is not None
        assert "decisions with 16 workers" in process.stderr.readline()  # at once, through a pipe
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopped" in said
    kept = json.loads(out.read_text())
    assert kept == json.loads(printed)
    assert kept["complete"] is False
    assert kept["conditions"]["seconds"] == 3600


def test_a_benchmark_that_ends_well_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "router.json"
    with router_benchmark(out, "--seconds", "0.05") as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    kept = json.loads(out.read_text())
    assert kept["complete"] is True
    assert set(kept["decisions_per_s"]) == {"16", "1024"}


def test_figures_are_on_disk_as_soon_as_they_are_there(tmp_path: Path) -> None:
    out = tmp_path / "some.json"
    with pytest.raises(ZeroDivisionError), Report(out) as report:
        report.append("rows", 1)
        report.append("rows", 2)
        assert json.loads(out.read_text()) == {"complete": False, "rows": [1, 2]}
        _ = 1 / 0
    assert json.loads(out.read_text()) == {"complete": False, "rows": [1, 2]}


def test_a_stop_in_the_middle_of_a_computation_undoes_what_was_started(tmp_path: Path) -> None:
    out, undone = tmp_path / "some.json", list[str]()
    with pytest.raises(SystemExit) as ended, Report(out) as report:
        try:
            report.put(first=1)
            os.kill(os.getpid(), signal.SIGTERM)
            report.put(never=2)
        finally:
            undone.append("worker")
    assert ended.value.code == 128 + signal.SIGTERM
    assert undone == ["worker"]
    assert json.loads(out.read_text()) == {"complete": False, "first": 1}


def test_counted_work_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(each(["a", "b", "c"], "requests")) == ["a", "b", "c"]
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "requests: 3 to do"
    assert lines[-1] == "requests: 3 of 3 done"


def test_every_benchmark_reports_in_this_way() -> None:
    programs = {"chaos", "fuzz", "handover", "jobs", "kernel_speed", "page_store", "quality", "reuse", "router"}
    programs |= {"http_api", "security", "serving", "soak", "steps", "structured"}
    for path in BENCHMARKS.rglob("*.py"):
        text = path.read_text()
        assert "rich" not in text, f"{path.name} shows progress where there is a terminal only"
        assert ("with Report(" in text) == (path.stem in programs), path.name
