"""The real thing: `isthmus up` with Ray on a small model, a worker killed, Ctrl-C; nothing is left behind."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from models import model_path

from isthmus.cluster.client.client import Client, build_request
from isthmus.proto.worker_pb2 import WORKER_HEALTH_READY, WorkerRole

PROGRAM = (sys.executable, "-m", "isthmus.cluster")
START_S = 240  # of a loaded machine


@dataclass
class Up:
    """A running `isthmus up`, in a process group of its own as in a shell."""

    process: subprocess.Popen[str]
    log: Path
    server: str
    admin: str

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "ISTHMUS_SERVER": self.server, "ISTHMUS_ADMIN": self.admin}
        program = [*PROGRAM, *arguments]
        return subprocess.run(program, capture_output=True, text=True, check=False, timeout=120, env=environment)

    def workers(self) -> dict[str, int]:
        """Process ids by worker name, as far as workers are ready."""
        done = self.command("status", "--json")
        known = json.loads(done.stdout).get("workers", [])  # there are none while all are started anew
        ready = [worker["address"] for worker in known if "READY" in worker["health"]]
        ports = {int(address.rpartition(":")[2]) for address in ready}
        found = {}
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended since they were listed
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports:
                        found[str(connection.laddr.port)] = process.pid
        return found


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    log = tmp_path_factory.mktemp("up") / "log"
    sockets = pytest.MonkeyPatch()
    sockets.setenv("ISTHMUS_RUNTIME", str(log.with_name("run")))  # of this test's workers and no others
    arguments = ("up", "--port", "0", "--model", model_path("tiny-llama"), "--dtype", "float32")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*PROGRAM, *arguments], stdout=stderr, stderr=stderr, text=True, start_new_session=True
        )
    try:
        yield Up(process, log, *_wait_ready(process, log))
    finally:
        sockets.undo()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_ready(process: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    """The addresses of the gateway: for clients, and its admin port."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if found := re.search(r"ready on (\S+):.*\nstatus and orders on (\S+):", log.read_text()):
            return found[1], found[2]
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(f"not ready in {START_S} s: {log.read_text()}")


def test_it_answers(up: Up) -> None:
    done = up.command("generate", "--temperature", "0", "--max-tokens", "5", "--ignore-eos", "--json", "hello")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["output_tokens"] == 5


def test_it_answers_over_http(up: Up) -> None:
    """On a free port, as its other ports are, and in plain text: it is on loopback."""
    found = re.search(r"HTTP, as OpenAI's API: (http://127\.0\.0\.1:\d+/v1)", up.log.read_text())
    assert found is not None
    body = {"prompt": "hello", "max_tokens": 5, "ignore_eos": True}
    with httpx.Client(trust_env=False, timeout=30) as client:
        answer = client.post(f"{found[1]}/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 5


def test_output_is_quiet(up: Up) -> None:
    lines = up.log.read_text().splitlines()
    # …: a slow start
    known = ("✓ ", "… ", "ready on ", "status and orders on ", "HTTP, as OpenAI's API: ", "try: ")
    assert all(line.startswith(known) for line in lines), lines


def test_a_killed_worker_comes_back(up: Up) -> None:
    before = up.workers()
    assert len(before) == 2
    os.kill(next(iter(before.values())), signal.SIGKILL)
    end = time.monotonic() + START_S
    while len(after := up.workers()) < 2 or after == before:
        assert time.monotonic() < end, up.log.read_text()
        time.sleep(0.5)
    assert up.command("generate", "--max-tokens", "3", "hello").returncode == 0


@asynccontextmanager
async def requests_running(up: Up) -> AsyncIterator[None]:
    """Requests run all the time in here, three at once; each must be answered as one is with nothing else going on."""
    sampling = {"temperature": 0, "max_tokens": 300, "ignore_eos": True}
    request = build_request(prompt="hello", sampling=sampling, codec="raw")
    ending = asyncio.Event()

    async with Client(up.server) as client:
        expected = (await client.answer(request, timeout_s=120)).token_ids

        async def ask() -> int:
            answered = 0
            while not ending.is_set():
                assert (await client.answer(request, timeout_s=120)).token_ids == expected
                answered += 1
            return answered

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        yield
        ending.set()
        assert all(await asyncio.gather(*asking))


async def ordered(up: Up, *arguments: str) -> list[str]:
    """What an `isthmus` command prints, beside the requests that run."""
    done = await asyncio.to_thread(up.command, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


async def ready(up: Up, wanted: dict[str, str]) -> None:
    """Returns once these workers, and no others, are ready in these roles."""
    end, roles = time.monotonic() + START_S, {}
    while roles != wanted:
        assert time.monotonic() < end, roles
        await asyncio.sleep(0.2)
        async with Client(up.server, admin=up.admin) as client:
            status = await client.status()
        roles = {
            worker.worker_id: WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower()
            for worker in status.workers
            if worker.health == WORKER_HEALTH_READY
        }


async def test_it_scales_and_flips_while_requests_run(up: Up, record_property: Callable[[str, object], None]) -> None:
    async with requests_running(up):
        done = await ordered(up, "scale", "prefill=2", "decode=2")
        assert done == ["started prefill-1, decode-1"]
        await ready(up, {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"})
        await ordered(up, "flip", "decode-1", "prefill")
        await ready(up, {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "prefill"})
    begun_s = time.monotonic()
    await ordered(up, "flip", "decode-1", "decode")
    record_property("flip_s", round(time.monotonic() - begun_s, 2))  # of an idle worker; the command's start too
    async with requests_running(up):
        done = await ordered(up, "scale", "prefill=1", "decode=1")
        assert done == ["drained prefill-1, decode-1"]
        await ready(up, {"prefill-0": "prefill", "decode-0": "decode"})


async def test_drained_with_its_host_it_has_no_workers_until_it_is_scaled(up: Up) -> None:
    """Its Ray has no other host. Its node is not closed, whoever names it: the gateway would lose it for good."""
    raylets = [process for process in up.descendants() if process.name() == "raylet"]
    words = [word for process in raylets for word in process.cmdline() if word.startswith("--gcs-address=")]
    ray = f"127.0.0.1:{words[0].rpartition(':')[2]}"
    for options in ((), ("--ray", ray)):
        assert await ordered(up, "drain", "--local", "--timeout", "5", *options) == [
            "2 workers of this host are drained: 0 requests finished"
        ]
        await ready(up, {})
        status = await asyncio.to_thread(up.command, "status")
        assert (status.returncode, status.stdout.count("none is wanted")) == (1, 2), status.stdout
        assert await ordered(up, "scale", "prefill=1", "decode=1") == ["started prefill-0, decode-0"]
        await ready(up, {"prefill-0": "prefill", "decode-0": "decode"})
        assert (await asyncio.to_thread(up.command, "generate", "--max-tokens", "3", "hello")).returncode == 0
    assert all(process.is_running() for process in raylets)


async def test_without_rays_head_requests_go_on_and_the_cluster_is_whole_again(up: Up) -> None:
    """Those that run and new ones, on the workers that are there. Once one of these is lost, all are started anew."""
    before = await asyncio.to_thread(up.workers)
    async with requests_running(up):
        head = [process for process in up.descendants() if process.name() == "gcs_server"]
        assert len(head) == 1
        head[0].kill()
        await asyncio.sleep(5)  # it is found to be gone
    async with requests_running(up):
        await asyncio.sleep(1)
    assert await asyncio.to_thread(up.workers) == before, "nothing was started anew"
    os.kill(next(iter(before.values())), signal.SIGKILL)
    end = time.monotonic() + START_S
    while len(after := await asyncio.to_thread(up.workers)) < 2 or set(after.values()) & set(before.values()):
        assert time.monotonic() < end, up.log.read_text()
    async with requests_running(up):
        await asyncio.sleep(1)


def test_ctrl_c_stops_everything(up: Up) -> None:
    processes = up.descendants()
    assert len(processes) > 4
    os.killpg(up.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    assert up.process.wait(60) == 0, up.log.read_text()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process.name() for process in alive if process.is_running()] == []
