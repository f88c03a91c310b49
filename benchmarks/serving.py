"""Speed of one worker against transformers: `python benchmarks/serving.py --json serving.json`.

One prefill and one decode worker run as processes with `--threads` threads each; the baseline runs in this process
with as many. Ours and the baseline take turns, so that whatever else the machine does hits both; each figure is the
median of `--requests` turns.

Decode: tokens per second of a full batch, from the moment that every request has its second token until the first of
them ends; the baseline is `generate` with the same prompts, less a `generate` of one token (its prefill).
Prefill: prompt tokens over the worker's time from its first chunk to the first token; the baseline is one forward.
"""

import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from processes import ready, worker
from report import conditions, write_json
from rich.console import Console
from rich.progress import Progress

from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.sampling import Sampling
from isthmus.proto.serving import open_channel
from isthmus.proto.worker_pb2 import WorkerReport

DECODE_PROMPT = 64
Figures = dict[str, list[float]]


class Baseline:
    """transformers on the same weights, in this process."""

    def __init__(self, path: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._net: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def decode(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Tokens per second of `generate`, its prefill taken off."""
        ids = self._torch.tensor(prompts)

        def seconds(tokens: int) -> float:
            begun = time.perf_counter()
            self._net.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            return time.perf_counter() - begun

        first = seconds(1)
        return len(prompts) * (new_tokens - 1) / (seconds(new_tokens) - first)

    def prefill(self, prompt: list[int]) -> float:
        """Tokens per second of one forward that fills a cache."""
        begun = time.perf_counter()
        with self._torch.inference_mode():
            self._net(self._torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        return len(prompt) / (time.perf_counter() - begun)


class Workers:
    """Our two workers, asked the way a gateway asks."""

    def __init__(self, stub: DecodeStub, prefill: str, report: WorkerReport) -> None:
        self._stub, self._prefill, self._report = stub, prefill, report

    async def _ask(self, prompt: list[int], tokens: int) -> tuple[list[float], float]:
        """Arrival times of the tokens, and the prefill time in seconds."""
        request = DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"bench-{time.monotonic_ns()}",
            model_fingerprint=self._report.model.fingerprint,
            codec=self._report.default_codec,
            prompt_token_ids=prompt,
            sampling=Sampling(temperature=0, max_tokens=tokens, ignore_eos=True).to_pb(),
            prefill_addresses=[self._prefill],
        )
        arrivals, prefill_s = [], 0.0
        call: Any = self._stub.Generate(request, timeout=600)
        async for event in call:
            arrivals += [time.perf_counter()] * len(event.token_ids)
            prefill_s = prefill_s or event.transfer.prefill_ms / 1e3
        return arrivals, prefill_s

    async def decode(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Tokens per second while all requests are in the batch."""
        answers = await asyncio.gather(*(self._ask(prompt, new_tokens) for prompt in prompts))
        arrivals = [times for times, _ in answers]
        begun = max(times[1] for times in arrivals)
        ended = min(times[-1] for times in arrivals)
        count = sum(begun < at <= ended for times in arrivals for at in times)
        return count / (ended - begun)

    async def prefill(self, prompt: list[int]) -> float:
        """Prompt tokens per second."""
        _, prefill_s = await self._ask(prompt, 2)
        return len(prompt) / prefill_s


def make_prompt(seed: int, tokens: int, vocab: int) -> list[int]:
    """Distinct, repeatable token ids."""
    return [(seed * 7919 + position * 104729 + 11) % vocab for position in range(tokens)]


async def compare(
    ours: Workers, baseline: Baseline, vocab: int, batches: list[int], prompts: list[int], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Takes turns and collects the rows."""
    decode, prefill = [], []
    with Progress() as progress:
        task = progress.add_task("turns", total=rounds * 2 * (len(batches) + len(prompts)))
        for batch in batches:
            figures: Figures = {"ours": [], "baseline": []}
            # A batch of several needs some steps until the last one has joined.
            tokens = new_tokens + 2 * batch
            for turn in range(rounds):
                texts = [make_prompt(turn * batch + row, DECODE_PROMPT, vocab) for row in range(batch)]
                figures["ours"].append(await ours.decode(texts, tokens))
                progress.advance(task)
                figures["baseline"].append(baseline.decode(texts, tokens))
                progress.advance(task)
            decode.append({"batch": batch} | _row(figures))
        for length in prompts:
            figures = {"ours": [], "baseline": []}
            for turn in range(rounds):
                text = make_prompt(turn, length, vocab)
                figures["ours"].append(await ours.prefill(text))
                progress.advance(task)
                figures["baseline"].append(baseline.prefill(text))
                progress.advance(task)
            prefill.append({"prompt": length} | _row(figures))
    return {"decode": decode, "prefill": prefill}


def _row(figures: Figures) -> dict[str, float]:
    ours, baseline = (statistics.median(figures[name]) for name in ("ours", "baseline"))
    return {
        "tokens_per_s": round(ours, 1),
        "baseline_tokens_per_s": round(baseline, 1),
        "ratio": round(ours / baseline, 3),
    }


async def run(
    model: str, dtype: str, threads: int, batches: list[int], prompts: list[int], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Starts the workers, compares, stops them."""
    with worker("prefill", model, dtype, threads) as prefill, worker("decode", model, dtype, threads) as decode:
        _, report = await ready([prefill, decode])
        baseline = Baseline(report.model.path, report.dtype, threads)
        async with open_channel(decode) as channel:
            ours = Workers(DecodeStub(channel), prefill, report)
            await ours.prefill(make_prompt(1, 64, report.model.vocab_size))  # warm up
            baseline.decode([[1, 2, 3]], 2)
            rows = await compare(ours, baseline, report.model.vocab_size, batches, prompts, new_tokens, rounds)
    return {"threads": threads, "dtype": report.dtype, **rows}


def main(
    model: Annotated[str, typer.Option(help="What the workers serve.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="Of weights and KV, ours and the baseline's.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Of each worker and of the baseline.")] = 1,
    batch: Annotated[list[int] | None, typer.Option(help="Decode batch size; repeatable.", show_default="1, 8")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Prefill length; repeatable.", show_default="512")] = None,
    requests: Annotated[int, typer.Option(min=1, help="How often each figure is taken; the median counts.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=8, help="Of each request of a decode figure.")] = 48,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Compares decode and prefill speed with transformers, same weights, dtype and threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    result = asyncio.run(run(model, dtype, threads, batch or [1, 8], prompt or [512], new_tokens, requests))
    result["conditions"] = conditions(model=model, requests=requests, new_tokens=new_tokens)
    write_json(json, result)
    Console().print_json(data=result)


if __name__ == "__main__":
    typer.run(main)
