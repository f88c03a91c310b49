"""Signals: the first ends in order, the second at once."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys
from isthmus.cluster.launch.foreground import run_service

async def start():
    print("starting", flush=True)
    await asyncio.sleep({start_s})
    {fail}
    print("ready", flush=True)

async def stop(drain_s):
    print("stopping", drain_s, flush=True)
    await asyncio.sleep(drain_s)
    print("stopped", flush=True)

sys.exit(run_service(start, stop, {drain_s}))
"""


def outcome(*waits: str, start_s: float = 0, drain_s: float = 0.1, fail: str = "") -> tuple[int, list[str]]:
    """Runs the program, sends SIGINT after each of the lines in `waits`; its exit code and what it printed."""
    code = PROGRAM.format(start_s=start_s, drain_s=drain_s, fail=fail)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        lines = []
        for awaited in waits:
            while not (lines and lines[-1].startswith(awaited)):
                lines.append(program.stdout.readline().strip())
            program.send_signal(signal.SIGINT)
        out, _ = program.communicate(timeout=30)
        return program.returncode, [*lines, *out.splitlines()]


def test_one_signal_drains() -> None:
    assert outcome("ready") == (0, ["starting", "ready", "stopping 0.1", "stopped"])


def test_a_second_signal_does_not_wait() -> None:
    code, lines = outcome("ready", "stopping", drain_s=60)
    assert (code, lines) == (130, ["starting", "ready", "stopping 60", "stopping 0", "stopped"])


def test_a_signal_while_it_starts() -> None:
    assert outcome("starting", start_s=60) == (130, ["starting", "stopping 0", "stopped"])


def test_a_start_that_fails_is_cleaned_up() -> None:
    assert outcome(fail="raise OSError('no')") == (1, ["starting", "stopping 0", "stopped"])


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_sigterm_drains_too(number: signal.Signals) -> None:
    code = PROGRAM.format(start_s=0, drain_s=0.1, fail="import os; os.kill(os.getpid(), 15)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "stopped")
