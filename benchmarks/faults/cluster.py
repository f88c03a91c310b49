"""A cluster of real processes that can be killed and stopped; whoever dies is started again at the same address.

They are forked from a process that has imported what they need, and loaded nothing: a start takes a third of the time,
so that on a small machine workers can be killed one soon after the other.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import grpc.aio
from support.dialling import to_gateway, to_worker

from isthmus.cluster.cli.main import run
from isthmus.cluster.launch.worker_thread import thread_settings
from isthmus.proto.worker_pb2 import WORKER_HEALTH_READY, GetReportRequest, GetStatusRequest, WorkerReport
from isthmus.proto.worker_pb2_grpc import ClusterStub, WorkerStub

from .tcp_proxy import BadLink

START_S = 240.0  # of a loaded machine
PRELOADED = ("isthmus.prefill.worker", "isthmus.decode.worker", "isthmus.cluster.frontend.gateway")
LOOK_S = 0.1  # between two looks at whether a process lives


@cache
def processes() -> ForkServerContext:
    """Where processes come from. Each worker computes in one thread, which has to be said before torch is imported."""
    os.environ.update(thread_settings(1))
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as the commands set it, which is too late in a fork
    os.environ.setdefault("ISTHMUS_BF16", "never")  # answers are compared: none may depend on its batch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    return context


def _child(arguments: Sequence[str], log: Path, faults: Path | None) -> None:
    """`isthmus ARGUMENTS` in this process, with its output in a file; `faults`: see `poison.install`."""
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    if faults is not None:
        from .poison import install

        install(faults)
    run(list(arguments))


@dataclass(eq=False)
class Node:
    """One process of the cluster, under a name and an address that outlive it."""

    name: str
    role: str  # "prefill", "decode" or "gateway"
    address: str
    arguments: tuple[str, ...]
    log: Path
    process: ForkServerProcess | None = None
    faults: Path | None = None  # the folder whose files arm faults in this process
    starts: int = 0
    stopped: bool = False  # by SIGSTOP

    def start(self) -> None:
        """Starts the process (again)."""
        self.process = processes().Process(target=_child, args=(self.arguments, self.log, self.faults), daemon=True)
        self.process.start()
        self.starts, self.stopped = self.starts + 1, False

    @property
    def alive(self) -> bool:
        """Whether the process runs, stopped or not."""
        return self.process is not None and self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to a process that lives."""
        if self.process is not None and self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, number)
            self.stopped = number == signal.SIGSTOP or (self.stopped and number != signal.SIGCONT)

    def end(self) -> None:
        """Kills the process for good."""
        if self.process is not None:
            self.process.kill()
            self.process.join()


@dataclass(eq=False)
class ChaosCluster:
    """Nodes and, between them, links that can be made bad."""

    nodes: list[Node]
    admin: str  # of the gateway
    links: dict[str, BadLink] = field(default_factory=dict)  # by node; what others use to reach it
    restarts: bool = True  # of those that die
    exits: list[tuple[str, int]] = field(default_factory=list)  # of those that died: who, and with which exit status

    @property
    def gateway(self) -> Node:
        return next(node for node in self.nodes if node.role == "gateway")

    @property
    def workers(self) -> list[Node]:
        return [node for node in self.nodes if node.role != "gateway"]

    def of(self, role: str) -> list[Node]:
        """The nodes of one role."""
        return [node for node in self.nodes if node.role == role]

    async def keep(self) -> None:
        """Starts again whoever died, until cancelled."""
        while True:
            for node in self.nodes:
                if self.restarts and not node.alive:
                    if node.process is not None:
                        self.exits.append((node.name, node.process.exitcode or 0))
                    node.start()
            await asyncio.sleep(LOOK_S)

    async def ready(self) -> set[str]:
        """Names of the workers that the gateway would use now."""
        async with to_gateway(self.admin) as channel:
            try:
                status = await ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=2)
            except grpc.aio.AioRpcError:
                return set()
        return {worker.worker_id for worker in status.workers if worker.health == WORKER_HEALTH_READY}

    async def wait_ready(self, within_s: float = START_S) -> None:
        """Returns once every worker is ready; TimeoutError with the logs' tails after `within_s`."""
        end = time.monotonic() + within_s
        wanted = {node.name for node in self.workers}
        while (ready := await self.ready()) != wanted:
            if time.monotonic() > end:
                tails = {node.name: node.log.read_text(errors="replace")[-500:] for node in self.nodes}
                raise TimeoutError(f"ready are {sorted(ready)} of {sorted(wanted)}: {tails}")
            await asyncio.sleep(0.2)

    async def reports(self) -> dict[str, WorkerReport]:
        """What each worker reports itself, past all links."""
        return {node.name: await _report(node.address) for node in self.workers}

    async def leaked_pages(self, within_s: float = 5.0) -> int:
        """Pages that are neither free nor cached, or requests that are still counted, after at most `within_s`."""
        end = time.monotonic() + within_s
        while True:
            left = 0
            for report in (await self.reports()).values():
                pages = report.pages
                left += pages.total - pages.free - pages.cached
                left += report.waiting_requests + report.running_requests
            if not left or time.monotonic() > end:
                return left
            await asyncio.sleep(0.05)


async def _report(address: str) -> WorkerReport:
    async with to_worker(address) as channel:
        return await WorkerStub(channel).GetReport(GetReportRequest(), timeout=10)


@contextlib.asynccontextmanager
async def chaos_cluster(
    model: str,
    folder: Path,
    *,
    prefill: int = 2,
    decode: int = 2,
    links: bool = False,
    faults: Path | None = None,
    worker_options: Sequence[str] = (),
    gateway_options: Sequence[str] = (),
) -> AsyncIterator[ChaosCluster]:
    """Workers and a gateway as processes, all ready; with `links` workers are reached through bad links only.

    Logs go to `folder`. At the end every process is gone.
    """
    own = ("--model", model, "--dtype", "fp32", "--threads", "1", *worker_options)
    nodes: list[Node] = []
    cluster = ChaosCluster(nodes, f"127.0.0.1:{free_port()}")
    for role, count in (("prefill", prefill), ("decode", decode)):
        for number in range(count):
            name, address = f"{role}-{number}", f"127.0.0.1:{free_port()}"
            arguments = ("worker", role, "--listen", address, "--name", name, *own)
            nodes.append(Node(name, role, address, arguments, folder / f"{name}.log", faults=faults))
            if links:
                cluster.links[name] = BadLink(address)
                await cluster.links[name].start()
    reached = ",".join(cluster.links[node.name].address if links else node.address for node in nodes)
    address = f"127.0.0.1:{free_port()}"
    ports = ("--listen", address, "--admin-listen", cluster.admin)
    serving = ("gateway", *ports, "--workers", reached, "--model", model, *gateway_options)
    nodes.append(Node("gateway", "gateway", address, serving, folder / "gateway.log"))
    keeper = asyncio.create_task(cluster.keep())
    try:
        await cluster.wait_ready()
        yield cluster
    finally:
        keeper.cancel()
        for node in nodes:
            node.end()
        for link in cluster.links.values():
            await link.stop()


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
