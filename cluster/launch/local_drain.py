"""Drains whatever runs on this host: its Ray node gets no new worker, and its workers end."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio

from ...proto.rpc.addresses import is_own, parse_address
from ...proto.worker_pb2 import DrainRequest, GetReportRequest
from ...proto.worker_pb2_grpc import WorkerStub
from .local_orders import OWN_LABEL, pid_of, sockets
from .progress import ProgressStep, StartProgress, with_activity

log = logging.getLogger(__name__)

PROCESSES = Path("/proc")
ANSWER_S = 15.0  # for a drain's answer beyond its own time
END_S = 5.0  # for the process of a drained worker to end
RAY_S = 10.0  # for Ray's head to take note


@dataclass(frozen=True)
class DrainedHere:
    """What was done on this host."""

    workers: int
    finished: int
    handed_over: int
    problems: tuple[str, ...]


async def drain_here(timeout_s: float, ray: str | None, shown: StartProgress) -> DrainedHere:
    """Drains all workers of this user on this host, each for at most so long, and waits for their ends.

    First their Ray nodes are closed, so that they get no more workers, and that of the Ray at `ray` (host:port), where
    it has one here. InvalidRequest where the folder of the workers' sockets cannot be used.
    """
    problems, paths = list[str](), list(sockets())
    parents = _parents(paths)
    nodes = [node for node in _raylets() if node.pid in parents or (ray is not None and _same(node.ray, ray))]
    if nodes:
        try:
            async with asyncio.timeout(RAY_S):
                await asyncio.to_thread(_close, nodes, timeout_s + ANSWER_S)
        except Exception as error:  # Ray's are of all kinds; the workers are drained all the same
            problems.append(f"the Ray node could not be closed: {_first_sentence(error)}")
    with shown:
        drains = (_drain(path, timeout_s, shown.step) for path in paths)
        done = await asyncio.gather(*drains, return_exceptions=True)
    counts = [result for result in done if isinstance(result, tuple)]
    problems += [str(result) for result in done if isinstance(result, Exception)]
    return DrainedHere(len(done), sum(c[0] for c in counts), sum(c[1] for c in counts), tuple(problems))


async def _drain(path: Path, timeout_s: float, step: ProgressStep) -> tuple[int, int]:
    name = f"worker process {pid_of(path)}"
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = WorkerStub(channel).Drain(DrainRequest(timeout_s=timeout_s), timeout=timeout_s + ANSWER_S)
        try:
            with step(f"drain of {name}") as tell:
                drained = await with_activity(call, partial(_running, channel), tell)
        except grpc.aio.AioRpcError as error:
            if not _is_there(path):
                return 0, 0  # it ended by itself meanwhile
            raise OSError(f"the worker at {path} was not drained: {error.details()}") from None
    end_s = time.monotonic() + END_S
    while _is_there(path) and time.monotonic() < end_s:
        await asyncio.sleep(0.05)
    return drained.finished, drained.handed_over


async def _running(channel: grpc.aio.Channel) -> str:
    try:
        report = await WorkerStub(channel).GetReport(GetReportRequest(), timeout=ANSWER_S)
    except grpc.aio.AioRpcError:
        return ""
    return f"{report.running_requests + report.waiting_requests} requests left"


def _is_there(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return True
    return False


@dataclass(frozen=True)
class _Raylet:
    """A raylet of this host."""

    pid: int
    node: str
    ray: str  # host:port of its head


def _close(nodes: list[_Raylet], deadline_s: float) -> None:
    """Has Ray place nothing on these nodes any more; they end once nothing runs on them."""
    logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that it has a token
    from ray import _raylet
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.core.generated import autoscaler_pb2

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray's own commands do
    raylet: Any = _raylet
    reasons: Any = autoscaler_pb2
    reason = reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # the other one needs an idle node
    deadline_ms = round((time.time() + deadline_s) * 1e3)
    for node in nodes:
        client = raylet.GcsClient(address=node.ray)
        accepted, why = client.drain_node(node.node, reason, "isthmus drain --local", deadline_ms)
        if not accepted:
            raise OSError(f"Ray does not drain node {node.node}: {why}")


def _first_sentence(error: Exception) -> str:
    """Ray's errors go on with advice."""
    text = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
    return f"{text} (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)" if "AuthToken" in text else text


def _raylets() -> Iterator[_Raylet]:
    """Those of this host, which have an address of it. One that `isthmus up` started is none: it ends with that, and
    has no other place for workers."""
    for path in PROCESSES.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, KeyError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if not words[0].endswith("/raylet"):
                continue
            options = {name: value for name, _, value in (word.partition("=") for word in words[1:])}
            if is_own(options["--node_ip_address"]) and OWN_LABEL not in options.get("--labels", ""):
                yield _Raylet(int(path.parent.name), options["--node_id"], options["--gcs-address"])


def _parents(paths: list[Path]) -> set[int]:
    """The processes that started the workers with these sockets: of a Ray actor its raylet."""
    found = set[int]()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            status = (PROCESSES / str(pid_of(path)) / "stat").read_text()
            found.add(int(status.rpartition(")")[2].split()[1]))
    return found


def _same(one: str, other: str) -> bool:
    """Whether two addresses, by name or number, are one; a loopback address is any of this host."""
    with contextlib.suppress(OSError, ValueError):
        found = [parse_address(text) for text in (one, other)]
        if found[1].is_loopback and found[0].port == found[1].port and is_own(found[0].host):
            return True
        hosts = [{info[4][0] for info in socket.getaddrinfo(address.host, None)} for address in found]
        return found[0].port == found[1].port and bool(hosts[0] & hosts[1])
    return False
