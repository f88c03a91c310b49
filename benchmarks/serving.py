"""Speed of one worker against transformers, and of two workers under mixed load.

    python benchmarks/serving.py --json serving.json

One prefill and one decode worker run as processes with `--threads` threads each; the baseline runs in this process
with as many. Ours and the baseline take turns, so that whatever else the machine does hits both; each figure is the
median of `--requests` turns. The baseline is run in the dtype of our weights, and in fp32 too where that is another.

Decode: tokens per second of a full batch, from the moment that every request has its second token until the first of
them ends; the baseline is the median step of `generate` with the same prompts.
Prefill: prompt tokens over the worker's time from its first chunk to the first token; the baseline is one forward.
Mixed load: see mixed.py.
"""

import asyncio
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from support.asking import Answer, ask, decode_request
from support.baseline import Baseline
from support.dialling import to_worker
from support.mixed import Load, mixed_load
from support.processes import ready, worker
from support.report import Report, conditions, percentiles, say

from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import WorkerReport

DECODE_PROMPT = 64


class Workers:
    """Our two workers."""

    def __init__(self, stub: DecodeStub, prefill: str, report: WorkerReport) -> None:
        self._stub, self._prefill, self._report = stub, prefill, report

    async def _ask(self, prompt: list[int], tokens: int) -> Answer:
        sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
        return await ask(self._stub, decode_request(self._report, prompt, sampling, [self._prefill]))

    async def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, list[float]]:
        """Tokens per second while all requests are in the batch, for `steps` steps or more; and the gaps in ms."""
        tokens = steps + 2 * len(prompts)  # a batch of several needs some steps until the last one has joined
        while True:
            answers = await asyncio.gather(*(self._ask(prompt, tokens) for prompt in prompts))
            begun = max(answer.arrivals_s[1] for answer in answers)
            ended = min(answer.arrivals_s[-1] for answer in answers)
            within = [at for answer in answers for at in answer.arrivals_s if begun < at <= ended]
            if len(within) >= steps * len(prompts) // 2:
                gaps = [gap for answer in answers for gap in answer.gaps_ms[1:]]
                return len(within) / (ended - begun), gaps
            tokens *= 2  # the prompts took longer than thought

    async def prefill(self, prompt: list[int]) -> tuple[float, float]:
        """Seconds of the prompt's chunks, and the time to the first token in ms."""
        answer = await self._ask(prompt, 2)
        return answer.transfer.prefill_ms / 1e3, answer.ttft_ms


def make_prompt(number: int, length: int, vocab: int) -> list[int]:
    """No two of them share a first page."""
    return [(number * 7919 + position * 104729 + number * position) % vocab for position in range(length)]


async def compare_decode(
    ours: Workers, baselines: dict[str, Baseline], vocab: int, batch: int, steps: int, rounds: int
) -> dict[str, Any]:
    """One row of the decode table. A baseline that came to its bound is not measured again."""
    rate, gaps, theirs, bounded = [], [], {dtype: [] for dtype in baselines}, {}
    for turn in range(rounds):
        say(f"decode, batch {batch}: round {turn + 1} of {rounds}")
        prompts = [make_prompt(1 + turn * batch + row, DECODE_PROMPT, vocab) for row in range(batch)]
        tokens_per_s, some = await ours.decode(prompts, steps)
        rate.append(tokens_per_s)
        gaps += some
        for dtype in [name for name in baselines if name not in bounded]:
            say(f"decode, batch {batch}: round {turn + 1} of {rounds}, transformers in {dtype}")
            times = baselines[dtype].decode(prompts, steps)
            theirs[dtype].append(batch / statistics.median(times))
            if len(times) < steps - 1:
                bounded[dtype] = {"steps": len(times)}
    return {"batch": batch} | row(rate, theirs) | {"baselines_bounded": bounded, "itl_ms": percentiles(gaps)}


async def compare_prefill(
    ours: Workers, baselines: dict[str, Baseline], vocab: int, length: int, rounds: int
) -> dict[str, Any]:
    """One row of the prefill table. A baseline that came to its bound is not measured again."""
    rate, ttft, theirs, bounded = [], [], {dtype: [] for dtype in baselines}, {}
    for turn in range(rounds):
        say(f"prefill, {length} tokens: round {turn + 1} of {rounds}")
        prompt = make_prompt(turn + length, length, vocab)
        seconds, ttft_ms = await ours.prefill(prompt)
        rate.append(length / seconds)
        ttft.append(ttft_ms)
        for dtype in [name for name in baselines if name not in bounded]:
            say(f"prefill, {length} tokens: round {turn + 1} of {rounds}, transformers in {dtype}")
            tokens, seconds = baselines[dtype].prefill(prompt)
            theirs[dtype].append(tokens / seconds)
            if tokens < length:
                bounded[dtype] = {"prompt": tokens}
    figures = {"baselines_bounded": bounded, "ttft_ms": round(statistics.median(ttft), 1)}
    return {"prompt": length} | row(rate, theirs) | figures


def row(ours: list[float], theirs: dict[str, list[float]]) -> dict[str, Any]:
    """`ratio` is to the baseline in the dtype of our weights, `ratio_to_best` to its fastest dtype."""
    medians = {dtype: statistics.median(values) for dtype, values in theirs.items()}
    rate, same = statistics.median(ours), next(iter(medians.values()))
    return {
        "tokens_per_s": round(rate, 1),
        "baseline_tokens_per_s": round(same, 1),
        "ratio": round(rate / same, 3),
        "baselines_tokens_per_s": {dtype: round(value, 1) for dtype, value in medians.items()},
        "ratio_to_best": round(rate / max(medians.values()), 3),
    }


def weight_dtype(report: WorkerReport) -> str:
    """Of a report whose dtype is `bfloat16`, `float32`, or `float32 (bfloat16 weights)`."""
    return report.dtype.removesuffix(" weights)").rpartition("(")[2]


async def run(
    report: Report,
    *,
    model: str,
    dtype: str,
    threads: int,
    batches: list[int],
    prompts: list[int],
    steps: int,
    rounds: int,
    baseline_s: float,
) -> None:
    """Starts the workers, compares, stops them."""
    say(f"starting a prefill and a decode worker for {model}")
    with worker("prefill", model, dtype, threads) as prefill, worker("decode", model, dtype, threads) as decode:
        _, about = await ready([prefill, decode])
        vocab = about.model.vocab_size
        baselines: dict[str, Baseline] = {}
        for name in dict.fromkeys([weight_dtype(about), "float32"]):
            say(f"loading transformers' model in {name}")
            baselines[name] = Baseline(about.model.path, name, threads, baseline_s)
        report.put(threads=threads, dtype=about.dtype)
        async with to_worker(decode, "decode") as channel:
            ours = Workers(DecodeStub(channel), prefill, about)
            say("warming up")
            await ours.prefill(make_prompt(1, 64, vocab))
            for baseline in baselines.values():
                baseline.decode([[1, 2, 3]], 3)
            for batch in batches:
                report.append("decode", await compare_decode(ours, baselines, vocab, batch, steps, rounds))
            for length in prompts:
                report.append("prefill", await compare_prefill(ours, baselines, vocab, length, rounds))


def main(
    model: Annotated[str, typer.Option(help="What the workers serve.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="Of our weights.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Of each worker and of the baseline.")] = 1,
    batch: Annotated[list[int] | None, typer.Option(help="Decode batch size; repeatable; 0 for none.")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Prefill length; repeatable; 0 for none.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="How often each figure is taken; the median counts.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=8, help="Steps of a decode figure.")] = 16,
    mixed_s: Annotated[float, typer.Option(min=0, help="Seconds of mixed load on each side; 0 for none.")] = 40,
    baseline_s: Annotated[
        float, typer.Option(min=0, help="Bound of one figure of transformers; then fewer tokens.")
    ] = 60,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Compares decode and prefill speed with transformers, and disaggregated with colocated workers."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    batches, prompts = [n for n in batch or [1, 8, 16, 32] if n], [n for n in prompt or [64, 512, 1024, 2048] if n]
    with Report(json) as report:
        about = conditions(
            model=model, requests=requests, new_tokens=new_tokens, mixed_s=mixed_s, baseline_s=baseline_s
        )
        report.put(threads=threads, conditions=about)
        if batches or prompts:
            asyncio.run(
                run(
                    report,
                    model=model,
                    dtype=dtype,
                    threads=threads,
                    batches=batches,
                    prompts=prompts,
                    steps=new_tokens,
                    rounds=requests,
                    baseline_s=baseline_s,
                )
            )
        if mixed_s:
            report.put(mixed=asyncio.run(mixed_load(model, dtype, threads, Load(seconds=mixed_s))))


if __name__ == "__main__":
    typer.run(main)
