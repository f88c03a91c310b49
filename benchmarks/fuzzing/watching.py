"""Who died, who is silent, and what their logs tell."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from faults.cluster import ChaosCluster, Node

from isthmus.proto.worker_pb2 import GetReportRequest, GetStatusRequest
from isthmus.proto.worker_pb2_grpc import ClusterStub, WorkerStub

from .fleet import Fleet, admin_of
from .inputs import Outcome

SILENCE_S = 30.0  # after which a process counts as hung
LOOK_S, PROBE_S = 0.2, 5.0


async def watch(fleet: Fleet, outcome: Outcome) -> None:
    """Notices who died and who is silent, until cancelled. Whoever died is started again by its cluster."""
    seen = {id(cluster): 0 for cluster in fleet.clusters}
    probed_s = time.monotonic()
    while True:
        for cluster in fleet.clusters:
            notice_deaths(cluster, cluster is fleet.spare, seen, outcome)
        if time.monotonic() - probed_s > PROBE_S:
            await asyncio.gather(*(probe(fleet, node, outcome) for node in fleet.nodes))
            probed_s = time.monotonic()
        await asyncio.sleep(LOOK_S)


def notice_deaths(cluster: ChaosCluster, drained: bool, seen: dict[int, int], outcome: Outcome) -> None:
    """Counts those of a cluster that died since the last look; with `drained` an end in order is none."""
    deaths = cluster.exits[seen[id(cluster)] :]
    seen[id(cluster)] += len(deaths)
    for name, status in deaths:
        if status == 0 and drained:
            continue
        node = next(node for node in cluster.nodes if node.name == name)
        outcome.crashed(f"{name} ended with {status}: {node.log.read_text(errors='replace')[-800:]}", name)


async def probe(fleet: Fleet, node: Node, outcome: Outcome) -> None:
    """A process that does not answer in SILENCE_S hangs; it is killed then, and started again."""
    starts = node.starts
    cluster = next(cluster for cluster in fleet.clusters if node in cluster.nodes)
    channel = fleet.channel(admin_of(cluster) if node.role == "gateway" else node.address)
    has_status = node.role in ("gateway", "supervisor")
    stub: Any = ClusterStub(channel) if has_status else WorkerStub(channel)
    try:
        if has_status:
            await stub.GetStatus(GetStatusRequest(), timeout=SILENCE_S)
        else:
            await stub.GetReport(GetReportRequest(), timeout=SILENCE_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and node.alive and node.starts == starts:
            outcome.hung(f"{node.name} did not answer in {SILENCE_S:g} s", node.name)


def bugs_in_logs(folder: Path) -> list[str]:
    """What the processes logged as errors of theirs."""
    found = []
    for path in sorted(folder.glob("*/*.log")):
        for line in path.read_text(errors="replace").splitlines():
            if "Traceback" in line or '"level": "error"' in line:
                found.append(f"{path.name}: {line[:1500]}")
    return found
