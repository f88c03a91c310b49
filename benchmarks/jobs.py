"""Generation jobs: nothing lost when the gateway is killed, submissions and watch events per second, TTFT beside batch.

    python benchmarks/jobs.py --json jobs.json
    python benchmarks/jobs.py --real --json jobs-real.json

The first takes about 5 minutes, without a model (support/fake_worker.py). The second: SmolLM2, crashes, and a file of
prompts interrupted twice.

Results are JSON with the fields `submitted, succeeded, identical, duplicated_tokens, lost` of the crash part,
`submits_per_s`, `watch_events_per_s` and `ttft_p99_ms: {alone, beside_batch, ratio}`; with --real those of the crash
part and `file`.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from support.help import Paragraphs
from support.processes import ISTHMUS, fake_workers, free_port, ready, worker
from support.report import Count, Report, conditions

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.client.jobs import JobsClient
from isthmus.cluster.client.measures import percentile
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.jobs_pb2 import JOB_STATE_SUCCEEDED, SubmitJobRequest
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE

MODEL = "smollm2-135m"
WAIT_S = 120.0


@asynccontextmanager
async def real_workers() -> AsyncIterator[str]:
    """A prefill and a decode worker of SmolLM2, one thread each, once they are ready; their addresses."""
    with worker("prefill", MODEL, "auto", 1) as prefill, worker("decode", MODEL, "auto", 1) as decode:
        await ready([prefill, decode], within_s=600)
        yield f"{prefill},{decode}"


class GatewayProcess:
    """`isthmus gateway` on a database of jobs; may be killed and started again on the same address."""

    def __init__(self, workers: str, database: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        ports = ("--listen", self.address, "--admin-listen", f"127.0.0.1:{free_port()}")
        arguments = (*ports, "--workers", workers, "--model", MODEL, "--jobs-db", database)
        self._command = [ISTHMUS, "gateway", *arguments]
        self.start()

    def start(self) -> None:
        """Starts it, and does not wait."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL, env=os.environ)

    async def end(self, number: signal.Signals) -> None:
        """Sends a signal and waits for its end."""
        self._process.send_signal(number)
        await asyncio.to_thread(self._process.wait)


@asynccontextmanager
async def gateway(workers: str) -> AsyncIterator[GatewayProcess]:
    """A gateway on a new database (ISTHMUS_TEST_DB names another), once it serves requests."""
    with tempfile.TemporaryDirectory() as folder:
        running = GatewayProcess(workers, os.environ.get("ISTHMUS_TEST_DB") or f"sqlite:///{folder}/jobs.db")
        try:
            async with JobsClient(running.address, patience_s=WAIT_S) as client:  # a job that is done: canaries are too
                job = await client.submit(SubmitJobRequest(requests=[request("warm up", 1, 0)]))
                async for _ in client.watch(job.job_id):
                    pass
            yield running
        finally:
            await running.end(signal.SIGTERM)


def request(prompt: str, max_tokens: int, seed: int) -> GenerateRequest:
    """One request; greedy where the seed is even."""
    return build_request(prompt=prompt, sampling={"max_tokens": max_tokens, "seed": seed, "temperature": seed % 2})


async def crashes(workers: str, jobs: int, tokens: int, kills: int) -> dict[str, Any]:
    """Jobs come in while the gateway is killed; their tokens against those of an undisturbed run."""
    draw = random.Random(11)
    requests = [request(f"Tell me about the number {number}.", tokens, number) for number in range(jobs)]
    lasts_s = 3.0 * kills
    bar = Count(f"{jobs} jobs, {kills} kills", 2 * jobs)
    async with gateway(workers) as running, JobsClient(running.address, patience_s=WAIT_S) as client:
        whole = await client.submit(SubmitJobRequest(requests=requests))
        async for event in client.watch(whole.job_id):
            bar.advance(event.output.finish_reason > 0)
        undisturbed = [result.token_ids async for result in client.results(whole.job_id)]

        async def one(asked: GenerateRequest) -> tuple[str, list[int], int]:
            await asyncio.sleep(draw.uniform(0, lasts_s))
            job = await client.submit(SubmitJobRequest(requests=[asked]))
            seen, repeated = list[int](), 0
            async for event in client.watch(job.job_id):
                repeated += len(event.output.token_ids) if event.output.index < len(seen) else 0
                seen += event.output.token_ids
            bar.advance()
            return job.job_id, seen, repeated

        watching = asyncio.gather(*map(one, requests))
        for _ in range(kills):
            await asyncio.sleep(draw.uniform(0.5, 3.0))
            await running.end(signal.SIGKILL)
            running.start()
            await client.job(whole.job_id)
        watched = await watching
        found = [await client.job(job_id) for job_id, _, _ in watched]
        results = [result for job_id, _, _ in watched async for result in client.results(job_id)]
    recorded = [result.token_ids for result in results]
    pairs = [(seen, repeated, own) for (_, seen, repeated), own in zip(watched, recorded, strict=True)]
    return {
        "submitted": len(watched),
        "succeeded": sum(job.state == JOB_STATE_SUCCEEDED for job in found),
        "identical": sum(own == expected for own, expected in zip(recorded, undisturbed, strict=True)),
        "duplicated_tokens": sum(repeated + max(0, len(seen) - len(own)) for seen, repeated, own in pairs),
        "lost": sum(len(seen) < len(own) or not own for seen, _, own in pairs),
        "kills": kills,
        "resumes": sum(job.resumes for job in found),
    }


async def submissions(count: int) -> float:
    """Jobs accepted each second, from 4 connections with 16 callers each; nothing else runs meanwhile."""
    bar = Count("submissions", count)
    with fake_workers(MODEL, 0, 500, 1) as workers:
        async with gateway(workers) as running, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(JobsClient(running.address, patience_s=10)) for _ in range(4)]
            numbers = iter(range(count))

            async def caller(client: JobsClient) -> None:
                for number in numbers:
                    asked = request(f"Tell me about {number}.", 50, number)
                    await client.submit(SubmitJobRequest(requests=[asked], priority=PRIORITY_BATCH))
                    bar.advance()

            begun_s = time.perf_counter()
            await asyncio.gather(*(caller(client) for client in clients for _ in range(16)))
            return count / (time.perf_counter() - begun_s)


async def watching(jobs: int) -> float:
    """Events each second that reach watchers, one for each of so many jobs, from the first token to the last."""
    tokens = 200
    bar = Count("watch events", jobs * tokens)
    with fake_workers(MODEL, 0, 20, jobs) as workers:
        async with gateway(workers) as running, JobsClient(running.address, patience_s=10) as client:
            times = list[float]()

            async def one(number: int) -> None:
                job = await client.submit(SubmitJobRequest(requests=[request(f"Count to {number}.", tokens, number)]))
                async for _ in client.watch(job.job_id):
                    times.append(time.perf_counter())
                bar.advance(tokens)

            await asyncio.gather(*map(one, range(jobs)))
    first, last = percentile(times, 5), percentile(times, 95)  # without the ends, where few watch
    return 0.9 * len(times) / (last - first)


async def interactive(requests: int, batch: int) -> dict[str, float]:
    """TTFT p99 of interactive requests, 4 a second, alone and with a queue of batch requests behind them."""
    bar = Count("TTFT beside batch", 2 * requests)
    with fake_workers(MODEL, 60, 25, 16) as workers:
        async with (
            gateway(workers) as running,
            Client(running.address) as client,
            JobsClient(running.address, patience_s=10) as jobs,
        ):

            async def ttft_p99() -> float:
                draw, answers = random.Random(5), list[asyncio.Task[float]]()

                async def one(number: int) -> float:
                    asked = request(f"Tell me about {number}.", 20, number)
                    asked.priority = PRIORITY_INTERACTIVE
                    answer = await client.answer(asked)
                    bar.advance()
                    assert answer.ttft_ms is not None
                    return answer.ttft_ms

                for number in range(requests):
                    answers.append(asyncio.create_task(one(number)))
                    await asyncio.sleep(draw.expovariate(4))
                return percentile(await asyncio.gather(*answers), 99)

            alone = await ttft_p99()
            queue = [request(f"Batch {number}.", 100, number) for number in range(batch)]
            job = await jobs.submit(SubmitJobRequest(requests=queue, priority=PRIORITY_BATCH))
            await asyncio.sleep(5)  # until it fills what is idle
            beside = await ttft_p99()
            done = await jobs.job(job.job_id)
            assert done.succeeded_count < batch, "the batch was over too soon: give it more requests"
            await jobs.cancel(job.job_id)
    return {
        "alone": alone,
        "beside_batch": beside,
        "ratio": beside / alone,
        "batch_requests_done": done.succeeded_count,
    }


async def file(workers: str, prompts: int) -> dict[str, Any]:
    """`isthmus batch run` of a file, interrupted at a third and at two thirds."""
    bar = Count("a file of prompts", prompts)
    begun_s, computed = time.perf_counter(), await output_tokens(workers)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        lines = [{"prompt": f"Write about the number {n}:", "max_tokens": 16, "seed": n} for n in range(prompts)]
        source.write_text("\n".join(map(json.dumps, lines)))
        async with gateway(workers) as running:
            command = (ISTHMUS, "batch", "run", str(source), "-o", str(output), "--server", running.address)
            for stop_at in (prompts // 3, 2 * prompts // 3, prompts + 1):
                process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
                while process.poll() is None:
                    await asyncio.sleep(0.5)
                    done = len(output.read_text().splitlines()) if output.exists() else 0
                    bar.reach(done)
                    if done >= stop_at:
                        process.send_signal(signal.SIGINT)
                        await asyncio.to_thread(process.wait)
        answers = [json.loads(line) for line in output.read_text().splitlines()]
    answered = [answer["line"] for answer in answers]
    return {
        "prompts": prompts,
        "answered": len(answered),
        "lost": prompts - len(set(answered)),
        "twice": len(answered) - len(set(answered)),
        "in_order": answered == sorted(answered),
        "tokens_computed": await output_tokens(workers) - computed,  # with those of the warm-up and of canaries
        "tokens_answered": sum(answer["usage"]["completion_tokens"] for answer in answers),
        "minutes": round((time.perf_counter() - begun_s) / 60, 2),
    }


async def output_tokens(workers: str) -> int:
    """Tokens that the decode workers have computed so far."""
    reports = await ready(workers.split(","))
    return int(sum(report.counters["output_tokens"] for report in reports if report.role == WORKER_ROLE_DECODE))


async def without_model(report: Report, options: argparse.Namespace) -> None:
    """The parts that stand-ins for workers answer."""
    only = options.only
    if only in (None, "crash"):
        with fake_workers(MODEL, 5, 50, 64) as workers:
            report.put(**await crashes(workers, options.jobs, 60, options.kills))
    if only in (None, "submit"):
        report.put(submits_per_s=round(await submissions(options.submissions), 1))
    if only in (None, "watch"):
        report.put(watch_events_per_s=round(await watching(options.watched), 1))
    if only in (None, "ttft"):
        report.put(ttft_p99_ms=await interactive(options.interactive, 5000))


async def with_model(report: Report, options: argparse.Namespace) -> None:
    """The parts that SmolLM2 answers."""
    async with real_workers() as workers:
        if options.only in (None, "crash"):
            report.put(**await crashes(workers, options.jobs, 32, options.kills))
        if options.only in (None, "file"):
            report.put(file=await file(workers, options.prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--submissions", type=int, default=5000)
    parser.add_argument("--watched", type=int, default=64, help="jobs watched at once")
    parser.add_argument("--interactive", type=int, default=300, help="requests for each TTFT figure")
    parser.add_argument("--only", choices=("crash", "submit", "watch", "ttft", "file"), help="one part")
    parser.add_argument("--real", action="store_true", help="instead: the parts crash and file on SmolLM2")
    parser.add_argument("--prompts", type=int, default=1000, help="lines of the file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.only and options.real != (options.only == "file") and options.only != "crash":
        parser.error(f"--only {options.only} {'needs no' if options.real else 'needs'} --real")
    with Report(options.json) as report:
        report.put(conditions=conditions())
        os.environ.setdefault("ISTHMUS_BF16", "never")  # answers are compared: see ISTHMUS_BF16 in docs/performance.md
        asyncio.run((with_model if options.real else without_model)(report, options))


if __name__ == "__main__":
    main()
