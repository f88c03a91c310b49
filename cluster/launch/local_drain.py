"""Drains whatever runs on this host: its Ray node gets no new worker, and its workers end."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from ...proto.rpc.addresses import parse_address
from ...proto.worker_pb2 import DrainRequest
from ...proto.worker_pb2_grpc import WorkerStub
from .local_orders import sockets

log = logging.getLogger(__name__)

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


async def drain_here(timeout_s: float, ray: str | None) -> DrainedHere:
    """Drains all workers of this user on this host, each for at most so long, and waits for their ends.

    `ray`: host:port of the Ray whose node here shall get no more of them; nothing is done where it has none here.
    """
    problems = []
    if ray is not None:
        try:
            async with asyncio.timeout(RAY_S):
                await asyncio.to_thread(_close_node, ray, timeout_s + ANSWER_S)
        except Exception as error:  # Ray's are of all kinds; the workers are drained all the same
            problems.append(f"the Ray node could not be closed: {' '.join(str(error).split()) or type(error).__name__}")
    done = await asyncio.gather(*(_drain(path, timeout_s) for path in sockets()), return_exceptions=True)
    counts = [result for result in done if isinstance(result, tuple)]
    problems += [str(result) for result in done if isinstance(result, Exception)]
    return DrainedHere(len(done), sum(c[0] for c in counts), sum(c[1] for c in counts), tuple(problems))


async def _drain(path: Path, timeout_s: float) -> tuple[int, int]:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = WorkerStub(channel).Drain(DrainRequest(timeout_s=timeout_s), timeout=timeout_s + ANSWER_S)
        try:
            drained = await call
        except grpc.aio.AioRpcError as error:
            if not _is_there(path):
                return 0, 0  # it ended by itself meanwhile
            raise OSError(f"the worker at {path} was not drained: {error.details()}") from None
    end_s = time.monotonic() + END_S
    while _is_there(path) and time.monotonic() < end_s:
        await asyncio.sleep(0.05)
    return drained.finished, drained.handed_over


def _is_there(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return True
    return False


def _close_node(ray: str, deadline_s: float) -> None:
    """Has Ray place nothing on its nodes of this host any more; they end once nothing runs on them."""
    nodes = list(_nodes_here(ray))
    if not nodes:
        return
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2

    raylet: Any = _raylet
    reasons: Any = autoscaler_pb2
    client = raylet.GcsClient(address=ray)
    reason = reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # the other one needs an idle node
    for node in nodes:
        deadline_ms = round((time.time() + deadline_s) * 1e3)
        accepted, why = client.drain_node(node, reason, "isthmus drain --local", deadline_ms)
        if not accepted:
            raise OSError(f"Ray does not drain node {node}: {why}")


def _nodes_here(ray: str) -> Iterator[str]:
    """Ids of the nodes of a Ray whose raylets are processes of this host, and have an address of it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if not words[0].endswith("/raylet"):
                continue
            options = {name: value for name, _, value in (word.partition("=") for word in words[1:])}
            if _is_ours(options.get("--node_ip_address", "")) and _same(options.get("--gcs-address", ""), ray):
                yield options["--node_id"]


def _is_ours(host: str) -> bool:
    """Whether this host, or this network namespace, has the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as probe, contextlib.suppress(OSError):
        probe.bind((host, 0))
        return True
    return False


def _same(one: str, other: str) -> bool:
    """Whether two addresses, by name or number, are one; a loopback address is any of this host."""
    with contextlib.suppress(OSError, ValueError):
        found = [parse_address(text) for text in (one, other)]
        if found[1].is_loopback and found[0].port == found[1].port and _is_ours(found[0].host):
            return True
        hosts = [{info[4][0] for info in socket.getaddrinfo(address.host, None)} for address in found]
        return found[0].port == found[1].port and bool(hosts[0] & hosts[1])
    return False
