"""The real thing apart: a Ray, `isthmus supervise`, and two gateways that follow it, while requests run."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from models import model_path
from ray_head import start_ray
from support.processes import free_port

from isthmus.cluster.client.client import Client, build_request
from isthmus.proto.worker_pb2 import WORKER_HEALTH_READY, WORKER_HEALTH_STARTING, ClusterStatus, WorkerReport

PROGRAM = (sys.executable, "-m", "isthmus.cluster")
START_S = 120  # of a loaded machine
NONE_RAN = "workers of this host are drained: 0 requests finished\n"
REQUEST = build_request(prompt="hello", sampling={"temperature": 0, "max_tokens": 40, "ignore_eos": True}, codec="raw")


@dataclass
class Apart:
    """A supervisor and gateways as processes."""

    folder: Path
    ray: str
    supervisor: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    gateways: list[tuple[str, str]] = field(default_factory=list)  # address, and that of its admin port
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    supervising: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One command of the supervisor, to its end."""
        environment = {**os.environ, "ISTHMUS_ADMIN": self.supervisor}
        program = [*PROGRAM, *arguments]
        return subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=100)

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A process that runs until the end."""
        with (self.folder / f"{arguments[0]}.log").open("ab") as log:
            process = subprocess.Popen([*PROGRAM, *arguments], stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def supervise(self) -> subprocess.Popen[bytes]:
        own = ("--cluster-id", "apart", "--address", self.ray, "--listen", self.supervisor)
        model = ("--model", model_path("tiny-llama"), "--dtype", "float32", "--device", "cpu", "--threads", "1")
        self.supervising = self.begin("supervise", *own, *model)
        return self.supervising

    def gateway(self) -> None:
        address, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        ports = ("--listen", address, "--admin-listen", admin, "--supervisor", self.supervisor, "--cluster-id", "apart")
        self.begin("gateway", *ports, "--model", model_path("tiny-llama"), "--jobs-db", "none")
        self.gateways.append((address, admin))

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))

    async def status(self, admin: str) -> ClusterStatus:
        async with Client(admin, admin=admin) as client:
            return await client.status(timeout_s=5)

    async def ready(self, wanted: set[str], admin: str = "") -> dict[str, WorkerReport]:
        """The workers, once these and no others are there and ready; by default as the first gateway sees them."""
        end_s, shown = time.monotonic() + START_S, ""
        while time.monotonic() < end_s:
            try:
                workers = (await self.status(admin or self.gateways[0][1])).workers
                there = {worker.worker_id: worker for worker in workers if worker.health == WORKER_HEALTH_READY}
                if there.keys() == wanted and len(workers) == len(wanted):
                    return there
                shown = str([(worker.worker_id, worker.health, worker.reason) for worker in workers])
            except Exception as error:
                shown = repr(error)
            await asyncio.sleep(0.2)
        raise AssertionError(f"{wanted} are not ready: {shown}\n{self.logs()}")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    folder = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ISTHMUS_RUNTIME", str(folder / "sockets"))  # of this test's workers and no others
        patched.setenv("ISTHMUS_LOG_FORMAT", "json")
        patched.setenv("RAY_AUTH_MODE", "token")
        patched.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        with start_ray({"prefill": 1, "decode": 2}) as ray:
            running = Apart(folder, ray)
            running.supervise()
            for _ in range(2):
                running.gateway()
            try:
                yield running
            finally:
                for process in running.processes:
                    process.kill()
                    process.wait()


@asynccontextmanager
async def asking(apart: Apart) -> AsyncIterator[None]:
    """Requests run all the time in here at each gateway; each must be answered as one is with nothing else going on."""
    ending = asyncio.Event()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(address)) for address, _ in apart.gateways]
        expected = (await clients[0].answer(REQUEST, timeout_s=60)).token_ids

        async def ask(client: Client) -> int:
            answered = 0
            while not ending.is_set():
                assert (await client.answer(REQUEST, timeout_s=60)).token_ids == expected
                answered += 1
            return answered

        tasks = [asyncio.create_task(ask(client)) for client in clients]
        yield
        ending.set()
        assert all(await asyncio.gather(*tasks))


def pid_of(address: str) -> int:
    """Of the process that listens there."""
    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections(kind="tcp"):
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr[1] == port
        if listens and connection.pid:
            return connection.pid
    raise AssertionError(f"nobody listens at {address}")


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(workers: dict[str, WorkerReport]) -> dict[str, int]:
    return {name: pid_of(worker.address) for name, worker in workers.items()}


async def test_both_gateways_have_the_workers_of_the_list(apart: Apart) -> None:
    for _, admin in apart.gateways:
        await apart.ready({"prefill-0", "decode-0"}, admin)
    status = await apart.status(apart.supervisor)
    assert (status.cluster_id, status.gateways) == ("apart", 2)
    async with asking(apart):
        await asyncio.sleep(1)
    refused = apart.run("drain", "decode-0", "--admin", apart.gateways[1][1])
    assert (
        f"FAILED_PRECONDITION: this gateway's workers are those of the supervisor at {apart.supervisor}"
        in refused.stderr
    )
    assert "ask a gateway" in apart.run("explain", "hello").stderr


async def test_requests_go_on_without_the_supervisor_and_the_next_one_adopts(apart: Apart) -> None:
    before = pids(await apart.ready({"prefill-0", "decode-0"}))
    async with asking(apart):
        apart.processes[0].kill()
        await asyncio.sleep(2.5)
        status = await apart.status(apart.gateways[0][1])
        assert "away for" in status.supervisor
        apart.supervise()
        assert pids(await apart.ready({"prefill-0", "decode-0"}, apart.supervisor)) == before
        await asyncio.sleep(1)
    assert pids(await apart.ready({"prefill-0", "decode-0"})) == before
    async with asyncio.timeout(10):
        while (await apart.status(apart.gateways[0][1])).supervisor != apart.supervisor:
            await asyncio.sleep(0.1)


async def test_a_worker_that_is_killed_is_replaced(apart: Apart) -> None:
    before = pids(await apart.ready({"prefill-0", "decode-0"}))
    os.kill(before["decode-0"], signal.SIGKILL)
    async with Client(apart.gateways[1][0]) as client:
        assert len((await client.answer(REQUEST, timeout_s=60)).token_ids) == 40, "it waited for the worker"
    after = pids(await apart.ready({"prefill-0", "decode-0"}))
    assert after["prefill-0"] == before["prefill-0"] and after["decode-0"] != before["decode-0"]


async def test_it_scales_and_what_waits_for_a_node_says_so(apart: Apart) -> None:
    async with asking(apart):
        done = await asyncio.to_thread(apart.run, "scale", "prefill=2", "decode=2")
        assert done.stdout.splitlines() == ["asked for prefill-1, decode-1"], done.stderr
        end_s, reason = time.monotonic() + START_S, ""
        while "waits for a node with {prefill: 1}" not in reason:
            assert time.monotonic() < end_s, reason
            await asyncio.sleep(0.2)
            workers = (await apart.status(apart.gateways[0][1])).workers
            reason = "".join(worker.reason for worker in workers if worker.worker_id == "prefill-1")
        done = await asyncio.to_thread(apart.run, "scale", "prefill=1")
        assert done.stdout.splitlines() == ["drained prefill-1"], done.stderr
        await apart.ready({"prefill-0", "decode-0", "decode-1"})
        done = await asyncio.to_thread(apart.run, "scale", "decode=1")
        assert len(done.stdout.splitlines()) == 1 and "drained decode-" in done.stdout, done.stderr
        left = {"decode-0", "decode-1"} - {done.stdout.split()[1]}
        await apart.ready({"prefill-0", *left})


async def test_a_pool_of_none_starts_again_for_a_request_that_waits(apart: Apart) -> None:
    done = await asyncio.to_thread(apart.run, "scale", "decode=0")
    assert "drained decode-" in done.stdout, done.stderr
    await apart.ready({"prefill-0"})
    status = apart.run("status")
    assert (status.returncode, "cannot serve: no decode worker: none is wanted" in status.stdout) == (1, True), status
    async with Client(apart.gateways[0][0]) as client:
        assert len((await client.answer(REQUEST, timeout_s=60)).token_ids) == 40
    await apart.ready({"prefill-0", "decode-0"})


async def test_without_prefill_workers_by_order_it_serves_and_says_so(apart: Apart) -> None:
    assert apart.run("scale", "prefill=0").returncode == 0
    await apart.ready({"decode-0"})
    for admin in (apart.supervisor, apart.gateways[0][1]):
        status = apart.run("status", "--admin", admin)
        assert (status.returncode, "by order: no prefill worker, decode" in status.stdout) == (0, True), status
    async with Client(apart.gateways[0][0]) as client:
        assert len((await client.answer(REQUEST, timeout_s=60)).token_ids) == 40
    assert apart.run("scale", "prefill=1").returncode == 0
    await apart.ready({"prefill-0", "decode-0"})


async def test_workers_are_ended_for_good_and_each_is_told(apart: Apart) -> None:
    before = pids(await apart.ready({"prefill-0", "decode-0"}))
    assert apart.supervising is not None
    apart.supervising.terminate()
    assert apart.supervising.wait(20) == 0
    ending = ("supervise", "--cluster-id", "apart", "--address", apart.ray, "--stop-workers", "--drain-s", "5")
    done = await asyncio.to_thread(apart.run, *ending)
    assert (done.returncode, done.stdout) == (0, "ended decode-0, prefill-0\n"), done
    told = {json.loads(line)["message"].partition(" (")[0] for line in done.stderr.splitlines()}
    assert told == {"✓ ray", "✓ end prefill-0", "✓ end decode-0"}
    assert not any(map(runs, before.values()))
    apart.supervise()
    await apart.ready({"prefill-0", "decode-0"})


async def test_everything_of_this_host_is_drained(apart: Apart) -> None:
    before = pids(await apart.ready({"prefill-0", "decode-0"}))
    done = await asyncio.to_thread(apart.run, "drain", "--local", "--timeout", "5")
    assert (done.returncode, done.stdout) == (0, "2 workers of this host are drained: 0 requests finished\n"), (
        done.stderr
    )
    end_s = time.monotonic() + 10
    while any(map(runs, before.values())):
        assert time.monotonic() < end_s, apart.logs()
        await asyncio.sleep(0.1)
    begun_s = time.monotonic()
    done = await asyncio.to_thread(apart.run, "drain", "--local", "--timeout", "60", "--ray", apart.ray)
    assert (done.returncode, done.stdout) == (0, "0 workers of this host are drained: 0 requests finished\n"), (
        done.stderr
    )
    assert time.monotonic() - begun_s < 10
    log = (apart.folder / "supervise.log").read_text()
    assert log.count('"why": "it was drained on its host, another one is asked for"') == 2
    workers = (await apart.status(apart.supervisor)).workers
    assert {worker.health for worker in workers} == {WORKER_HEALTH_STARTING} and all(one.reason for one in workers)


def test_all_lines_of_all_processes_are_json(apart: Apart) -> None:
    for process in apart.processes:
        if process.poll() is None:
            process.terminate()
    assert [process.wait(30) for process in apart.processes[1:]] == [0] * (len(apart.processes) - 1)
    lines = [line for path in apart.folder.glob("*.log") for line in path.read_text().splitlines()]
    assert [line for line in lines if not line.startswith('{"time": ')] == []
