"""Requests for a cluster under faults, and what became of each: whole, identical to an undisturbed run, how long."""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio
from support.dialling import to_gateway

from isthmus.cluster.client.client import build_request
from isthmus.proto.generation_pb2 import GenerateEvent, GenerateRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub

RETRY_S = 0.5  # a client's, after UNAVAILABLE: the gateway was lost


@dataclass
class Outcome:
    """One request as its client saw it."""

    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    error: str = ""
    replays: int = 0
    retries: int = 0  # of the client, because the gateway was lost
    ttft_s: float = 0.0
    pause_s: float = 0.0  # longest wait for a token after the first one


def make_requests(
    count: int, *, vocab: int, prompt: tuple[int, int], tokens: tuple[int, int], codecs: Sequence[str], seed: int
) -> list[GenerateRequest]:
    """Random prompts, in turn greedy and seeded, over codecs and two tenants."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        sampling = {"temperature": 0.0 if number % 2 else 0.8, "seed": number + 1, "ignore_eos": True}
        sampling["max_tokens"] = rng.randint(*tokens)
        ids = [rng.randrange(3, vocab) for _ in range(rng.randint(*prompt))]
        request = build_request(token_ids=ids, sampling=sampling, codec=codecs[number // 2 % len(codecs)])
        request.request_id, request.tenant = f"chaos-{number}", f"tenant-{number % 3}"
        requests.append(request)
    return requests


async def answer_all(
    address: str, requests: Sequence[GenerateRequest], *, at_once: int, timeout_s: float = 300.0
) -> list[Outcome]:
    """Sends the requests, `at_once` at a time; each client asks again where the gateway was lost.

    Tenants are new ones each time: no page of an earlier run is found again, and everything is computed anew.
    """
    outcomes, run = [Outcome() for _ in requests], secrets.token_hex(4)
    requests = [_for_tenant(request, f"{request.tenant}-{run}") for request in requests]
    waiting = list(reversed(range(len(requests))))

    async def client() -> None:
        async with to_gateway(address) as channel:
            while waiting:
                number = waiting.pop()
                await _answer(channel, requests[number], outcomes[number], timeout_s)

    await asyncio.gather(*(client() for _ in range(at_once)))
    return outcomes


def _for_tenant(request: GenerateRequest, tenant: str) -> GenerateRequest:
    changed = GenerateRequest()
    changed.CopyFrom(request)
    changed.tenant = tenant
    return changed


async def _answer(channel: grpc.aio.Channel, request: GenerateRequest, outcome: Outcome, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while True:
        try:
            await _once(channel, request, outcome, end)
            return
        except grpc.aio.AioRpcError as error:
            outcome.error = f"{error.code().name}: {error.details()}"
            lost = error.code() is grpc.StatusCode.UNAVAILABLE
            if not lost or time.monotonic() > end:
                return
            outcome.retries += 1
            await asyncio.sleep(RETRY_S)


async def _once(channel: grpc.aio.Channel, request: GenerateRequest, outcome: Outcome, end: float) -> None:
    outcome.token_ids, sent, last, pause = [], time.monotonic(), 0.0, 0.0
    call = GenerationStub(channel).Generate(request, timeout=max(0.1, end - sent))
    try:
        while isinstance(event := await call.read(), GenerateEvent):
            now = time.monotonic()
            if event.token_ids:
                if last:
                    pause = max(pause, now - last)
                else:
                    outcome.ttft_s = now - sent
                last = now
            assert event.index == len(outcome.token_ids) or not event.token_ids, "a token is lost or came twice"
            outcome.token_ids += event.token_ids
            if event.finish_reason:
                outcome.finished, outcome.error = True, ""
                outcome.replays = event.timings.replays
    finally:
        call.cancel()
    outcome.pause_s = pause


async def cancel_storm(
    address: str, requests: Sequence[GenerateRequest], *, count: int, within_s: float, seed: int
) -> int:
    """Starts `count` requests, evenly over `within_s`, and cancels each at a random moment; how many still ran."""
    rng = random.Random(seed)

    async def client(number: int) -> bool:
        await asyncio.sleep(within_s * number / count)
        call = GenerationStub(channel).Generate(requests[number % len(requests)])
        reading = asyncio.create_task(_drain(call))
        await asyncio.wait({reading}, timeout=rng.uniform(0.0, 1.0))
        running = not reading.done()
        call.cancel()
        await asyncio.wait({reading})
        return running

    async with to_gateway(address) as channel:
        return sum(await asyncio.gather(*(client(number) for number in range(count))))


async def _drain(call: grpc.aio.UnaryStreamCall) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        while isinstance(await call.read(), GenerateEvent):
            continue
