"""How fast a prompt's KV and its first token get across: `python benchmarks/handover.py --json handover.json`.

Starts a local cluster of one prefill and one decode worker with `isthmus up`, and sends one request after the other
over the public API. Handover is the time from the prefill worker's sampling of the first token to its arrival at this
client, by the clock of this host. The first and second tokens' gap holds the tail of the pages, their decoding and
one step of the decode worker. Of prompts of 1,024 tokens and more, what share of the bytes left before the prefill
ended is told apart: short prompts have one chunk, and most of their pages leave with its end.
"""

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import grpc.aio
import typer
from support.dialling import to_worker
from support.processes import free_port, isthmus
from support.report import Report, conditions, each, percentiles, say

from isthmus.cluster.client.client import Answer, Client, build_request
from isthmus.proto.worker_pb2 import GetReportRequest, WorkerReport
from isthmus.proto.worker_pb2_grpc import WorkerStub

PROMPT_TOKENS = (64, 256, 1024)
LONG_TOKENS = 1024  # prompts that long compute in several chunks, beside which their pages leave
START = "start_"  # of the counters of a worker's report that tell how it started
GREEDY = {"temperature": 0.0, "ignore_eos": True}


async def first_answer(client: Client, within_s: float) -> None:
    """Asks until the cluster answers; TimeoutError after `within_s`."""
    request = build_request(token_ids=[1, 2, 3], sampling=GREEDY | {"max_tokens": 1})
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            await client.answer(request, timeout_s=10)
            return
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.05)
    raise TimeoutError(f"the cluster did not answer within {within_s:.0f} s")


async def start_phases(workers: Iterable[WorkerReport]) -> dict[str, dict[str, int]]:
    """Milliseconds of each part of each worker's start, and (`_cpu`) those of a core that it took."""
    found: dict[str, dict[str, int]] = {}
    for worker in workers:
        async with to_worker(worker.address) as channel:
            report = await WorkerStub(channel).GetReport(GetReportRequest(), timeout=10)
        of = {name: count for name, count in report.counters.items() if name.startswith(START)}
        found[report.worker_id] = {
            name.removeprefix(START).removesuffix("_ms"): count for name, count in sorted(of.items())
        }
    return found


async def measure(client: Client, numbers: range, codec: str, answers: list[Answer]) -> None:
    """Runs the requests of those numbers one after the other, cycling through the prompt lengths; none start alike.

    Each answer goes to `answers` when it is there.
    """
    vocab = (await client.model()).vocab_size
    for number in each(numbers, "requests"):
        length = PROMPT_TOKENS[number % len(PROMPT_TOKENS)]
        token_ids = [(number * 7919 + position * 104729) % vocab for position in range(length)]
        request = build_request(token_ids=token_ids, sampling=GREEDY | {"max_tokens": 8}, codec=codec)
        answers.append(await client.answer(request, timeout_s=120))


def early(answers: list[Answer]) -> float:
    """Which share of their bytes was sent before the last chunk of the prompt was computed."""
    transfers = [answer.timings.transfer for answer in answers]
    sent = sum(transfer.kv_bytes_before_prefill_end for transfer in transfers)
    return round(sent / sum(transfer.kv_bytes_wire for transfer in transfers), 4)


def summarize(answers: list[Answer], start_to_first_token_s: float) -> dict[str, Any]:
    """The figures of the JSON; `answers` cycle through the prompt lengths."""
    by_length = {tokens: answers[at :: len(PROMPT_TOKENS)] for at, tokens in enumerate(PROMPT_TOKENS)}
    long = [answer for tokens, some in by_length.items() if tokens >= LONG_TOKENS for answer in some]
    transfers = [answer.timings.transfer for answer in answers]
    wire = sum(transfer.kv_bytes_wire for transfer in transfers)
    steps = [gap for answer in answers for gap in answer.itl_ms[1:]]
    return {
        "requests": len(answers),
        "start_to_first_token_s": round(start_to_first_token_s, 2),
        "handover_ms": percentiles([answer.handover_ms or 0 for answer in answers]),
        "gap_1_2_ms": percentiles([answer.itl_ms[0] for answer in answers]),
        "step_ms": percentiles(steps),
        "bytes_sent_before_prefill_end": early(answers),
        "bytes_sent_before_prefill_end_long": early(long),
        "by_prompt_tokens": {
            tokens: {
                "handover_ms": percentiles([answer.handover_ms or 0 for answer in some]),
                "bytes_sent_before_prefill_end": early(some),
            }
            for tokens, some in by_length.items()
        },
        "kv_ratio_to_bf16": round(sum(t.kv_bytes_bf16 for t in transfers) / wire, 3),
    }


async def run(report: Report, model: str, requests: int, codec: str, dtype: str) -> None:
    """Brings the cluster up, measures, takes it down."""
    port, admin = free_port(), f"127.0.0.1:{free_port()}"
    begun = time.monotonic()
    answers: list[Answer] = []
    say("starting a cluster")
    with isthmus("up", "--model", model, "--port", str(port), "--admin-listen", admin, "--dtype", dtype):
        async with Client(f"127.0.0.1:{port}", admin=admin) as client:
            await first_answer(client, 180)
            took = time.monotonic() - begun
            phases = await start_phases((await client.status()).workers)
            report.put(start_to_first_token_s=round(took, 2), start_phases_ms=phases)
            for name, of in phases.items():
                say(f"{name}: " + ", ".join(f"{phase} {ms}" for phase, ms in of.items()))
            say(f"first token after {took:.1f} s; warming up")
            lengths = len(PROMPT_TOKENS)
            await measure(client, range(lengths), codec, [])
            try:
                await measure(client, range(lengths, lengths + requests), codec, answers)
            finally:
                if len(answers) >= lengths:
                    report.put(**summarize(answers, took))


def main(
    model: Annotated[str, typer.Option(help="What the workers serve.")] = "smollm2-135m",
    requests: Annotated[int, typer.Option(min=len(PROMPT_TOKENS), help="How many to send.")] = 60,
    codec: Annotated[str, typer.Option(help="Of the KV transfer.")] = "tq-k4v4",
    dtype: Annotated[str, typer.Option(help="Of weights and KV.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Measures handover, the gap between tokens 1 and 2, overlap and start-up of a local cluster."""
    with Report(json) as report:
        report.put(conditions=conditions(model=model, codec=codec, dtype=dtype, prompt_tokens=PROMPT_TOKENS))
        asyncio.run(run(report, model, requests, codec, dtype))


if __name__ == "__main__":
    typer.run(main)
