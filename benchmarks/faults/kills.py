"""Workers killed or stopped under load, one every few seconds: is every answer whole, and what it would have been?"""

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.proto.generation_pb2 import GenerateRequest

from .cluster import ChaosCluster, Node
from .load import Outcome, answer_all

DETECTION_S = {"kill": 0.0, "stop": 3.0}  # until others can know: a broken connection at once, silence after that long
DELAY_S = 0.02  # of each chunk of a delayed link
THROTTLE = 10e6 / 8  # bytes/s: 10 Mbit/s
STOPPED_S = 6.0  # between SIGSTOP and SIGCONT


@dataclass
class Faults:
    """What was done to whom."""

    done: list[str] = field(default_factory=list)
    spared: int = 0  # turns in which every role had one ready worker only


async def hurt_workers(
    cluster: ChaosCluster, faults: Faults, *, every_s: float, seed: int, how: str = "kill", roles: Sequence[str] = ()
) -> None:
    """Kills or stops a random worker every `every_s`, until cancelled; never the last ready one of its role."""
    rng = random.Random(seed)
    while True:
        await asyncio.sleep(every_s * rng.uniform(0.8, 1.2))
        ready = await cluster.ready()
        spare = [
            node
            for node in cluster.workers
            if (node.role in roles or not roles)
            and node.name in ready
            and any(other.name in ready for other in cluster.of(node.role) if other is not node)
        ]
        faults.spared += not spare
        if spare:
            node = rng.choice(spare)
            faults.done.append(f"{how} {node.name}")
            await _hurt(node, how)


async def _hurt(node: Node, how: str) -> None:
    if how == "kill":
        node.send(signal.SIGKILL)
        return
    node.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(STOPPED_S)
    finally:
        node.send(signal.SIGCONT)


async def hurt_gateway(
    cluster: ChaosCluster, faults: Faults, *, every_s: float, seed: int, how: str = "kill", times: int = 1000
) -> None:
    """Kills or stops the gateway at most so often, until cancelled, each time `every_s` after all workers were ready.

    One that is new has canaries to send first, and an answer takes seconds: killed without regard to that, it would
    never finish one.
    """
    rng = random.Random(seed)
    for _ in range(times):
        await cluster.wait_ready()
        await asyncio.sleep(every_s * rng.uniform(0.8, 1.2))
        faults.done.append(f"{how} gateway")
        await _hurt(cluster.gateway, how)


async def hurt_links(cluster: ChaosCluster, faults: Faults, fault: str, *, every_s: float, seed: int) -> None:
    """Cuts a random link every `every_s`, or delays or throttles all of them, until cancelled."""
    rng = random.Random(seed)
    links = list(cluster.links.items())
    try:
        while True:
            if fault == "cut":
                await asyncio.sleep(every_s * rng.uniform(0.8, 1.2))
                name, link = rng.choice(links)
                link.cut()
                faults.done.append(f"cut {name}")
                continue
            for _, link in links:
                link.delay_s = DELAY_S if fault == "delayed" else 0.0
                link.bytes_per_s = THROTTLE if fault == "throttled" else None
            faults.done.append(f"{fault} all")
            await asyncio.Event().wait()
    finally:
        for _, link in links:
            link.delay_s, link.bytes_per_s = 0.0, None


async def compare_runs(
    cluster: ChaosCluster, requests: Sequence[GenerateRequest], fault: Any, faults: Faults, *, at_once: int
) -> dict[str, Any]:
    """Answers the requests undisturbed and then while `fault` (a coroutine) runs; what differs."""
    calm_s = time.monotonic()
    calm = await answer_all(cluster.gateway.address, requests, at_once=at_once)
    rough_s = time.monotonic()
    breaking = asyncio.create_task(fault)
    try:
        rough = await answer_all(cluster.gateway.address, requests, at_once=at_once)
    finally:
        breaking.cancel()
        await asyncio.wait({breaking})
    end_s = time.monotonic()
    await cluster.wait_ready()
    kinds = [name.partition(" ")[0] for name in faults.done]
    detection_s = max((DETECTION_S.get(kind, 0.0) for kind in kinds), default=0.0)
    return {
        **summary(calm, rough, detection_s),
        "differing": differing(requests, calm, rough),
        "faults": len(faults.done),
        "spared": faults.spared,
        "hurt": sorted(faults.done),
        "leaked_pages": await cluster.leaked_pages(),
        "calm_s": round(rough_s - calm_s, 1),
        "disturbed_s": round(end_s - rough_s, 1),
        "restarts": sum(node.starts - 1 for node in cluster.nodes),
    }


def differing(
    requests: Sequence[GenerateRequest], calm: Sequence[Outcome], rough: Sequence[Outcome]
) -> list[dict[str, Any]]:
    """The answers that are not those of the undisturbed run, and from which token on."""
    return [
        {
            "request": request.request_id,
            "codec": request.codec,
            "sampling": "seeded" if request.sampling.temperature else "greedy",
            "prompt": len(request.tokens.ids),
            "replays": late.replays,
            "from": next(
                (at for at, (a, b) in enumerate(zip(early.token_ids, late.token_ids, strict=False)) if a != b),
                min(len(early.token_ids), len(late.token_ids)),
            ),
        }
        for request, early, late in zip(requests, calm, rough, strict=True)
        if early.token_ids != late.token_ids
    ]


def summary(calm: Sequence[Outcome], rough: Sequence[Outcome], detection_s: float) -> dict[str, Any]:
    """Counts over two runs of the same requests; pauses are those of answers that went on elsewhere, in seconds."""
    pairs = list(zip(calm, rough, strict=True))
    pauses = [max(0.0, late.pause_s - detection_s) for late in rough if late.replays]
    calm_pauses = [early.pause_s for early in calm]
    return {
        "requests": len(rough),
        "answered": sum(late.finished for late in rough),
        "identical": sum(late.finished and early.token_ids == late.token_ids for early, late in pairs),
        "wrong_tokens": sum(
            sum(a != b for a, b in zip(early.token_ids, late.token_ids, strict=False)) for early, late in pairs
        ),
        "replayed": sum(late.replays > 0 for late in rough),
        "replays": sum(late.replays for late in rough),
        "retried_by_client": sum(late.retries > 0 for late in rough),
        "pause_p50_s": round(float(np.percentile(pauses, 50)), 3) if pauses else None,
        "pause_p99_s": round(float(np.percentile(pauses, 99)), 3) if pauses else None,
        "calm_pause_p99_s": round(float(np.percentile(calm_pauses, 99)), 3),
        "detection_s": detection_s,
        "errors": sorted({late.error for late in rough if late.error}),
    }
