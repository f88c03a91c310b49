"""`isthmus drain`, `flip` and `scale`: what a person does to a running cluster."""

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..defaults import DRAIN_S
from .terminal import options as opt

if TYPE_CHECKING:
    from ...proto.worker_pb2 import DrainResponse, ScaleResponse, WorkerReport
    from ...proto.worker_pb2_grpc import ClusterAsyncStub

T = TypeVar("T")

ROLES = ("prefill", "decode")

WorkerId = Annotated[str, typer.Argument(metavar="WORKER", help="Id or address, as `isthmus status` shows them.")]
DrainTimeout = Annotated[
    float, typer.Option("--timeout", min=0, help="Seconds for running requests; those left then go on elsewhere.")
]


def drain(
    worker: Annotated[
        str | None, typer.Argument(metavar="WORKER", help="Id or address, as `isthmus status` shows them.")
    ] = None,
    timeout: DrainTimeout = DRAIN_S,
    local: Annotated[bool, typer.Option("--local", help="All workers of this user on this host.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            envvar="RAY_ADDRESS",
            help="With --local: host:port of a Ray whose node here gets no more workers, where none runs yet too.",
        ),
    ] = None,
    admin: opt.Admin = opt.DEFAULT_ADMIN,
) -> None:
    """Drain a worker and end it: no new work, running requests finish, or go on on another worker.

    With --local all workers of this user on this host, whoever started them; their Ray node gets no other, and those of
    `isthmus up` stay away until `isthmus scale`. Where none runs it is done at once.

    [bold]Examples[/]

      isthmus drain decode-1

      isthmus drain 10.0.0.7:7001 --timeout 5

      isthmus drain --local --timeout 600    # before the host, or its pod, ends
    """
    if (worker is None) != local:
        raise typer.BadParameter("name one worker, or give --local for all of this host")
    if worker is None:
        raise typer.Exit(_drain_local(timeout, ray))
    done = asyncio.run(_drain(admin, worker, timeout))
    print(f"{worker} is drained: {_ended(done.finished, done.handed_over)}")


def _drain_local(timeout_s: float, ray: str | None) -> int:
    """Drains what runs on this host; the exit code."""
    opt.configure_logs(opt.DEFAULT_LOG_LEVEL)
    from ..launch.local_drain import drain_here
    from ..launch.progress import StartProgress

    done = asyncio.run(drain_here(timeout_s, ray if ray and ":" in ray else None, StartProgress()))
    print(f"{done.workers} workers of this host are drained: {_ended(done.finished, done.handed_over)}")
    for problem in done.problems:
        opt.say(f"error: {problem}")
    return int(bool(done.problems))


def _ended(finished: int, handed_over: int) -> str:
    return f"{finished} requests finished" + (f", {handed_over} handed over to other workers" if handed_over else "")


def flip(
    worker: WorkerId,
    role: Annotated[str, typer.Argument(metavar="prefill|decode", help="The role it shall have.")],
    timeout: DrainTimeout = DRAIN_S,
    admin: opt.Admin = opt.DEFAULT_ADMIN,
) -> None:
    """Give a worker another role: it is drained first and keeps its loaded weights.

    [bold]Examples[/]

      isthmus flip prefill-1 decode

      isthmus flip 10.0.0.7:7001 prefill --timeout 5
    """
    if role not in ROLES:
        raise typer.BadParameter(f"role {role!r}; allowed: {', '.join(ROLES)}")
    report = asyncio.run(_flip(admin, worker, role, timeout))
    print(f"{report.worker_id} at {report.address} is a {role} worker and ready")


def scale(
    counts: Annotated[list[str], typer.Argument(metavar="ROLE=N...", help="prefill=N, decode=N, or both.")],
    timeout: DrainTimeout = DRAIN_S,
    admin: opt.Admin = opt.DEFAULT_ADMIN,
) -> None:
    """Change the number of workers that `isthmus up` or `supervise` runs; those too many are drained first.

    [bold]Examples[/]

      isthmus scale prefill=3 decode=5

      isthmus scale decode=1 --timeout 60
    """
    wanted = _counts(counts)
    done = asyncio.run(_scale(admin, wanted, timeout))
    for verb, names in (("asked for" if done.asked_for else "started", done.started), ("drained", done.drained)):
        if names:
            print(f"{verb} {', '.join(names)}")
    if not done.started and not done.drained:
        print("nothing to change")


def _counts(texts: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in texts:
        role, equals, number = text.partition("=")
        if role not in ROLES or not equals or not number.isdigit():
            raise typer.BadParameter(f"{text!r} is not prefill=N or decode=N")
        if role in counts:
            raise typer.BadParameter(f"{role} is given twice")
        counts[role] = int(number)
    return counts


async def _drain(admin: str, worker: str, timeout_s: float) -> "DrainResponse":
    from ...proto.worker_pb2 import DrainWorkerRequest

    async with opt.admin_of(admin) as cluster:
        return await _told(cluster, cluster.DrainWorker(DrainWorkerRequest(worker=worker, timeout_s=timeout_s)))


async def _flip(admin: str, worker: str, role: str, timeout_s: float) -> "WorkerReport":
    from ...proto.worker_pb2 import FlipWorkerRequest, WorkerRole

    number = WorkerRole.Value(f"WORKER_ROLE_{role.upper()}")
    async with opt.admin_of(admin) as cluster:
        order = FlipWorkerRequest(worker=worker, role=number, timeout_s=timeout_s)
        return await _told(cluster, cluster.FlipWorker(order))


async def _scale(admin: str, counts: dict[str, int], timeout_s: float) -> "ScaleResponse":
    from ...proto.worker_pb2 import ScaleRequest

    async with opt.admin_of(admin) as cluster:
        return await _told(cluster, cluster.Scale(ScaleRequest(timeout_s=timeout_s, **counts)))


async def _told(cluster: "ClusterAsyncStub", order: Awaitable[T]) -> T:
    """What an order returns; where that takes long, lines say which workers are not ready, and what they have left."""
    import grpc.aio

    from ...proto.worker_pb2 import WORKER_HEALTH_READY, GetStatusRequest, WorkerHealth
    from ..launch.progress import with_lines

    async def waited_for() -> str:
        try:
            status = await cluster.GetStatus(GetStatusRequest(), timeout=5.0)
        except grpc.aio.AioRpcError:
            return ""  # the order says it
        parts = [
            f"{worker.worker_id} is {WorkerHealth.Name(worker.health).removeprefix('WORKER_HEALTH_').lower()}, "
            f"{worker.running_requests + worker.waiting_requests} requests"
            for worker in status.workers
            if worker.health != WORKER_HEALTH_READY
        ]
        return "; ".join(parts) or "waiting for workers to start or end"

    return await with_lines(order, waited_for, opt.say)
