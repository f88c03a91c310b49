"""Workers and clusters as processes of their own, for benchmarks; each is gone when its context ends."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from isthmus.proto.worker_pb2 import GetReportRequest, WorkerReport
from isthmus.proto.worker_pb2_grpc import WorkerStub

from .dialling import to_worker

BENCHMARKS = Path(__file__).parents[1]
ISTHMUS = str(Path(sys.executable).with_name("isthmus"))


def free_port() -> int:
    """A port that nobody listens on now, and that no outgoing connection takes before somebody does: below those that
    the kernel draws for them."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def isthmus(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `isthmus ARGUMENTS` beside the benchmark; SIGTERM at the end, SIGKILL if that does not help in 30 s.

    `variables`: of its environment, besides those of the benchmark.
    """
    # Never the jobs of the person who measures, nor a port that something else of theirs may have.
    own = {"ISTHMUS_JOBS_DB": "none", "ISTHMUS_GATEWAY__HTTP_LISTEN": "none"}
    environment = {**own, **os.environ, **variables}
    process = subprocess.Popen([ISTHMUS, *arguments], stdout=subprocess.DEVNULL, env=environment)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Running:
    """A worker process."""

    address: str
    process: subprocess.Popen[bytes]

    def rss_mb(self) -> int:
        """Resident memory now."""
        return self._status_mb("VmRSS")

    def peak_rss_mb(self) -> int:
        """The most it ever was."""
        return self._status_mb("VmHWM")

    def _status_mb(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def running_worker(role: str, model: str, dtype: str, threads: int, *options: str) -> Iterator[Running]:
    """One worker with no Ray, at once; `ready` waits for it."""
    address = f"127.0.0.1:{free_port()}"
    shared = ("--model", model, "--dtype", dtype, "--threads", str(threads))
    with isthmus("worker", role, "--listen", address, *shared, *options) as process:
        yield Running(address, process)


@contextmanager
def worker(role: str, model: str, dtype: str, threads: int, *options: str) -> Iterator[str]:
    """The same, its address only."""
    with running_worker(role, model, dtype, threads, *options) as running:
        yield running.address


async def ready(addresses: Sequence[str], within_s: float = 300) -> list[WorkerReport]:
    """Waits until all workers answer; TimeoutError after `within_s`."""
    end = time.monotonic() + within_s
    return [await _report(address, end) for address in addresses]


async def _report(address: str, end: float) -> WorkerReport:
    async with to_worker(address) as channel:
        while time.monotonic() < end:
            try:
                return await WorkerStub(channel).GetReport(GetReportRequest(), timeout=1)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)
    raise TimeoutError(f"no worker answers at {address}")


@contextmanager
def fake_workers(model: str, prefill_ms: float, step_ms: float, slots: int) -> Iterator[str]:
    """Workers without a model (`fake_worker.py`); their addresses, as `isthmus gateway --workers` takes them."""
    pace = ("--prefill-ms", str(prefill_ms), "--step-ms", str(step_ms), "--slots", str(slots))
    command = [sys.executable, "-m", "support.fake_worker", "--model", model, *pace]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=BENCHMARKS)
    assert process.stdout is not None
    try:
        if not (addresses := process.stdout.readline().strip()):
            raise RuntimeError("the fake workers did not start; what they say is above")
        yield addresses
    finally:
        process.terminate()
        process.wait()
