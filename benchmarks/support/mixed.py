"""Mixed load: a stream of short chats while long prompts arrive, on two workers of one core each.

Disaggregated: one prefill and one decode worker. Colocated: two decode workers that each compute the prompts of their
requests themselves, in chunks between steps; requests go to them in turn. Both get the same requests at the same times,
whether or not they keep up: chats at an even pace, and long prompts as often as the one prefill worker can bear, which
is measured first with one that it computes alone.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import WorkerReport

from .asking import Answer, ask, decode_request
from .dialling import transport_as
from .processes import ready, worker
from .report import each, percentiles, say


@dataclass(frozen=True, kw_only=True)
class Load:
    """What arrives, and for how long."""

    seconds: float
    chat_every_s: float = 1.5
    chat_prompt: int = 64
    chat_tokens: int = 48
    long_busy: float = 0.65  # share of the time of one core that long prompts take; chats need some of the rest
    long_prompt: int = 2000
    long_tokens: int = 16


@dataclass(frozen=True)
class _Arrival:
    at_s: float
    chat: bool
    prompt: list[int]
    sampling: Sampling


def arrivals(load: Load, long_every_s: float, vocab: int) -> list[_Arrival]:
    """The same for every side, in the order of time; two long prompts at least."""
    rng = random.Random(1)

    def one(at_s: float, chat: bool, length: int, tokens: int) -> _Arrival:
        prompt = [rng.randrange(vocab) for _ in range(length)]
        return _Arrival(at_s, chat, prompt, Sampling(temperature=0, max_tokens=tokens, ignore_eos=True))

    longs = max(2, int(load.seconds / long_every_s))
    chats = int(max(load.seconds, longs * long_every_s) / load.chat_every_s)
    some = [one(n * load.chat_every_s, True, load.chat_prompt, load.chat_tokens) for n in range(chats)]
    some += [one((n + 0.25) * long_every_s, False, load.long_prompt, load.long_tokens) for n in range(longs)]
    return sorted(some, key=lambda arrival: arrival.at_s)


async def _send(
    stubs: Sequence[DecodeStub], prefill: Sequence[str], report: WorkerReport, plan: Sequence[_Arrival], name: str
) -> dict[str, Any]:
    """Figures of one side."""
    begun = time.perf_counter()
    tasks: list[tuple[_Arrival, asyncio.Task[Answer]]] = []
    sent = {True: 0, False: 0}
    for arrival in each(plan, f"{name}: requests sent"):
        await asyncio.sleep(max(0.0, begun + arrival.at_s - time.perf_counter()))
        stub = stubs[sent[arrival.chat] % len(stubs)]
        sent[arrival.chat] += 1
        request = decode_request(report, arrival.prompt, arrival.sampling, prefill)
        tasks.append((arrival, asyncio.create_task(ask(stub, request))))
    answers = [(arrival, await task) for arrival, task in each(tasks, f"{name}: answers")]
    seconds = max(answer.arrivals_s[-1] for _, answer in answers) - begun
    chats = [answer for arrival, answer in answers if arrival.chat]
    return {
        "chat_itl_ms": percentiles([gap for answer in chats for gap in answer.gaps_ms]),
        "chat_ttft_ms": percentiles([answer.ttft_ms for answer in chats]),
        "long_ttft_ms": percentiles([answer.ttft_ms for arrival, answer in answers if not arrival.chat]),
        "output_tokens_per_s": round(sum(len(answer.token_ids) for _, answer in answers) / seconds, 1),
        "tokens_per_s": round(sum(len(a.prompt) + len(answer.token_ids) for a, answer in answers) / seconds, 1),
    }


@asynccontextmanager
async def _side(
    roles: Sequence[str], model: str, dtype: str, threads: int
) -> AsyncIterator[tuple[list[DecodeStub], list[str], WorkerReport]]:
    """Workers that are warmed up: stubs of those that decode, addresses of those that only prefill, and a report."""
    transport = transport_as("gateway")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(transport.close)
        say(f"mixed load: starting {' and '.join(roles)} workers")
        addresses = [stack.enter_context(worker(role, model, dtype, threads)) for role in roles]
        reports = await ready(addresses)
        decode = [address for address, role in zip(addresses, roles, strict=True) if role == "decode"]
        prefill = [address for address, role in zip(addresses, roles, strict=True) if role == "prefill"]
        stubs = [DecodeStub(transport.dial(address, "decode")) for address in decode]
        for stub in stubs:
            request = decode_request(reports[-1], [1, 2, 3], Sampling(max_tokens=4, ignore_eos=True), prefill)
            await ask(stub, request)
        yield stubs, prefill, reports[-1]


async def mixed_load(model: str, dtype: str, threads: int, load: Load) -> dict[str, Any]:
    """Both sides, one after the other: `mixed` of serving.json."""
    sides: dict[str, dict[str, Any]] = {}
    async with _side(("prefill", "decode"), model, dtype, threads) as (stubs, prefill, report):
        vocab = report.model.vocab_size
        rng = random.Random(2)
        alone = [rng.randrange(vocab) for _ in range(load.long_prompt)]
        request = decode_request(report, alone, Sampling(max_tokens=2, ignore_eos=True), prefill)
        say(f"mixed load: one prompt of {load.long_prompt} tokens alone")
        long_s = (await ask(stubs[0], request)).ttft_ms / 1e3
        plan = arrivals(load, long_s / load.long_busy, vocab)
        sides["disaggregated"] = await _send(stubs, prefill, report, plan, "disaggregated")
    async with _side(("decode", "decode"), model, dtype, threads) as (stubs, prefill, report):
        sides["colocated"] = await _send(stubs, prefill, report, plan, "colocated")
    chats = sum(arrival.chat for arrival in plan)
    return {
        "chat_itl_p99_ms": {name: side["chat_itl_ms"]["p99"] for name, side in sides.items()},
        "throughput_tokens_per_s": {name: side["tokens_per_s"] for name, side in sides.items()},
        "details": sides,
        "load": vars(load) | {"chats": chats, "longs": len(plan) - chats, "long_alone_s": round(long_s, 2)},
    }
