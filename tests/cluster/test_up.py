"""The real thing: `isthmus up` with Ray on a small model, a worker killed, Ctrl-C; nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from models import model_path

PROGRAM = (sys.executable, "-m", "isthmus.cluster")
START_S = 240  # of a loaded machine


@dataclass
class Up:
    """A running `isthmus up`, in a process group of its own as in a shell."""

    process: subprocess.Popen[str]
    log: Path
    server: str

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = [*PROGRAM, *arguments, "--server", self.server]
        return subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)

    def workers(self) -> dict[str, int]:
        """Process ids by worker name, as far as workers are ready."""
        done = self.command("status", "--json")
        ready = [worker["address"] for worker in json.loads(done.stdout)["workers"] if "READY" in worker["health"]]
        ports = {int(address.rpartition(":")[2]) for address in ready}
        found = {}
        for process in self.descendants():
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports:
                    found[str(connection.laddr.port)] = process.pid
        return found


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    log = tmp_path_factory.mktemp("up") / "log"
    arguments = ("up", "--port", "0", "--model", model_path("tiny-llama"), "--dtype", "float32")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*PROGRAM, *arguments], stdout=stderr, stderr=stderr, text=True, start_new_session=True
        )
    try:
        yield Up(process, log, _wait_ready(process, log))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_ready(process: subprocess.Popen[str], log: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if found := re.search(r"ready on (\S+):(\d+):", log.read_text()):
            return f"{found[1]}:{found[2]}"
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(f"not ready in {START_S} s: {log.read_text()}")


def test_it_answers(up: Up) -> None:
    done = up.command("generate", "--temperature", "0", "--max-tokens", "5", "--ignore-eos", "--json", "hello")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["output_tokens"] == 5


def test_output_is_quiet(up: Up) -> None:
    lines = up.log.read_text().splitlines()
    assert all(line.startswith(("✓ ", "ready on ", "try: ")) for line in lines), lines


def test_a_killed_worker_comes_back(up: Up) -> None:
    before = up.workers()
    assert len(before) == 2
    os.kill(next(iter(before.values())), signal.SIGKILL)
    end = time.monotonic() + START_S
    while len(after := up.workers()) < 2 or after == before:
        assert time.monotonic() < end, up.log.read_text()
        time.sleep(0.5)
    assert up.command("generate", "--max-tokens", "3", "hello").returncode == 0


def test_ctrl_c_stops_everything(up: Up) -> None:
    processes = up.descendants()
    assert len(processes) > 4
    os.killpg(up.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    assert up.process.wait(60) == 0, up.log.read_text()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process.name() for process in alive if process.is_running()] == []
