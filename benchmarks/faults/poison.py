"""Requests that an engine dies of, and engines that hang: who else is hurt, and for how long?

The faults are in the worker processes of the benchmark alone: `install` wraps the runners of both roles there. A prompt
that begins with a certain token is computed as any other, until its fault is armed by a file.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isthmus.proto.generation_pb2 import GenerateRequest

from .cluster import ChaosCluster
from .load import Outcome, answer_all

POISON, HANG_PREFILL, HANG_DECODE = 0, 1, 2  # first tokens of prompts, which `make_requests` never draws
HANGS = {"prefill": HANG_PREFILL, "decode": HANG_DECODE}
LOOK_S = 0.05
GIVE_UP_S = 300.0


def install(folder: Path) -> None:
    """Has the runners of this process raise, or block for good, over such prompts while files in `folder` say so."""
    from isthmus.decode.engine import DecodeEngine
    from isthmus.prefill.engine import PrefillEngine

    def fault(role: str, firsts: set[int]) -> None:
        if POISON in firsts and (folder / "poison").exists():
            raise RuntimeError("a poisonous prompt")
        if HANGS[role] in firsts:
            with contextlib.suppress(FileNotFoundError):  # once: whoever removes the file
                (folder / f"hang-{role}").unlink()
                (folder / f"blocked-{role}").write_text(str(time.time()))
                threading.Event().wait()

    def wrap(engine: Any, role: str, prompt_of: Callable[[Any, Any], Sequence[int]]) -> None:
        draw = engine._draw

        def draw_or_fail(self: Any, plan: Any, *others: Any) -> Any:
            fault(role, {prompt_of(self, part.sequence)[0] for part in plan.sequences})
            return draw(self, plan, *others)

        engine._draw = draw_or_fail

    wrap(PrefillEngine, "prefill", lambda engine, sequence: engine._jobs[sequence].token_ids)
    wrap(DecodeEngine, "decode", lambda engine, sequence: engine._sequences[sequence].prompt)


def beginning_with(request: GenerateRequest, token: int) -> GenerateRequest:
    changed = GenerateRequest()
    changed.CopyFrom(request)
    changed.tokens.ids[0] = token
    return changed


async def poison(
    cluster: ChaosCluster, requests: Sequence[GenerateRequest], folder: Path, *, at_once: int
) -> dict[str, Any]:
    """Answers the requests undisturbed, and then with the one in their middle poisonous."""
    middle = len(requests) // 2
    mixed = [*requests[:middle], beginning_with(requests[middle], POISON), *requests[middle + 1 :]]
    calm = await answer_all(cluster.gateway.address, mixed, at_once=at_once)
    before = _starts(cluster)
    (folder / "poison").touch()
    rough = await answer_all(cluster.gateway.address, mixed, at_once=at_once)
    (folder / "poison").unlink()
    await cluster.wait_ready()
    blamed = rough.pop(middle)
    del calm[middle]
    return {
        "others": len(rough),
        **_compared(calm, rough),
        "deaths": _starts(cluster) - before,
        "blamed": blamed.error,
        "leaked_pages": await cluster.leaked_pages(),
    }


async def hang(
    cluster: ChaosCluster, requests: Sequence[GenerateRequest], folder: Path, *, at_once: int
) -> dict[str, Any]:
    """Answers the requests undisturbed, and then with a step of a prefill and of a decode engine blocked: over the
    longest prompts, which no decode worker computes itself to spare the transfer."""
    requests = list(requests)
    longest = sorted(range(len(requests)), key=lambda number: len(requests[number].tokens.ids))
    for number, first in zip(longest[-len(HANGS) :], HANGS.values(), strict=True):
        requests[number] = beginning_with(requests[number], first)
    calm = await answer_all(cluster.gateway.address, requests, at_once=at_once)
    before = _starts(cluster)
    detected: dict[str, float] = {}
    calms: list[Outcome] = []
    roughs: list[Outcome] = []
    for role in HANGS:
        (folder / f"hang-{role}").touch()
        looking = asyncio.create_task(_detected_s(cluster, folder / f"blocked-{role}"))
        try:
            roughs += await answer_all(cluster.gateway.address, requests, at_once=at_once)
            calms += calm
            detected[role] = round(await looking, 2)
        finally:
            looking.cancel()
        await cluster.wait_ready()
    return {
        "requests": len(roughs),
        "detected_s": max(detected.values()),
        "by_role": detected,
        **_compared(calms, roughs),
        "deaths": _starts(cluster) - before,
        "errors": sorted({late.error for late in roughs if late.error}),
        "leaked_pages": await cluster.leaked_pages(),
    }


async def _detected_s(cluster: ChaosCluster, blocked: Path) -> float:
    """Seconds from the moment at which a step was blocked until the gateway uses its worker no more.

    TimeoutError where no step came to be blocked, or nobody noticed.
    """
    async with asyncio.timeout(GIVE_UP_S):
        while not blocked.exists() or not blocked.read_text():
            await asyncio.sleep(LOOK_S)
        while len(await cluster.ready()) == len(cluster.workers):
            await asyncio.sleep(LOOK_S)
    return time.time() - float(blocked.read_text())


def _starts(cluster: ChaosCluster) -> int:
    return sum(node.starts for node in cluster.workers)


def _compared(calm: Sequence[Outcome], rough: Sequence[Outcome]) -> dict[str, int]:
    pairs = list(zip(calm, rough, strict=True))
    return {
        "answered": sum(late.finished for late in rough),
        "identical": sum(late.finished and early.token_ids == late.token_ids for early, late in pairs),
    }
