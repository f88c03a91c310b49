"""Random load with cancels for minutes: `python benchmarks/soak.py --minutes 30 --json soak.json`.

One prefill and one decode worker run as processes. Requests of random length, sampling and codec keep coming, as many
at once as `--at-once`; some are cancelled before their first token or after a few, some name a prefill worker that does
not exist first, and some have their prompt computed by the decode worker. At the end:

* pages: once idle, every page of both workers must be free or cached;
* memory: resident memory at the end against that after the first third of the time, and its peak, of each worker;
* tokens: some of the finished requests are run again one by one, and must give the same tokens.

The command fails where pages are leaked or a token differs.
"""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

import grpc.aio
import typer
import yaml
from support.asking import ask, decode_request
from support.dialling import to_worker
from support.processes import Running, ready, running_worker
from support.report import Report, conditions, each, say

from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import GetReportRequest, WorkerReport
from isthmus.proto.worker_pb2_grpc import WorkerStub

# Small, so that what the workers keep on purpose is full soon and what grows on is a leak.
POOL_TOKENS, HOST_CACHE_GIB = 8_192, 0.1
LOOKS = 12  # at resident memory
NOBODY = "127.0.0.1:9"  # the discard port: nothing listens there
CODECS = ("tq-k4v4", "tq-k4v4", "raw", "")


@dataclass
class Soak:
    """The load, and what came of it."""

    stub: DecodeStub
    prefill: str
    report: WorkerReport
    rng: random.Random
    longest: int  # prompt tokens
    reruns: int  # size of the sample that is run again
    counts: Counter[str] = field(default_factory=Counter)
    finished: list[tuple[DecodeRequest, list[int]]] = field(default_factory=list)

    def request(self) -> DecodeRequest:
        """A random one."""
        rng = self.rng
        length = min(self.longest, int(rng.lognormvariate(4.5, 1.0)) + 1)
        sampling = Sampling(
            temperature=rng.choice([0, 0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            logprobs=rng.choice([None, 3]),
            seed=rng.getrandbits(64),
            max_tokens=rng.randint(1, 64),
            ignore_eos=rng.random() < 0.5,
        )
        prefill = rng.choice([[self.prefill]] * 6 + [[NOBODY, self.prefill]] + [[]])
        prompt = [rng.randrange(3, self.report.model.vocab_size) for _ in range(length)]
        return decode_request(self.report, prompt, sampling, prefill, rng.choice(CODECS))

    async def one(self) -> None:
        """Sends a request; sometimes ends it early."""
        request, fate = self.request(), self.rng.random()
        self.counts["requests"] += 1
        try:
            if fate < 0.1:
                with suppress(TimeoutError):
                    await asyncio.wait_for(ask(self.stub, request), self.rng.random())
                self.counts["cancelled"] += 1
            elif fate < 0.25:
                await ask(self.stub, request, cancel_after=self.rng.randint(1, 20))
                self.counts["cancelled"] += 1
            else:
                answer = await ask(self.stub, request)
                self.counts["finished"] += 1
                self.counts["tokens"] += len(answer.token_ids)
                self._keep(request, answer.token_ids)
        except grpc.aio.AioRpcError as error:
            self.counts[f"error_{error.code().name.lower()}"] += 1

    def _keep(self, request: DecodeRequest, token_ids: list[int]) -> None:
        """A sample of all that finished, each as likely (reservoir sampling, Vitter 1985, algorithm R)."""
        if len(self.finished) < self.reruns:
            self.finished.append((request, token_ids))
        elif (place := self.rng.randrange(self.counts["finished"])) < self.reruns:
            self.finished[place] = request, token_ids

    async def keep_sending(self, until_s: float) -> None:
        """One request after the other."""
        while time.monotonic() < until_s:
            await self.one()

    async def differing(self) -> int:
        """How many of the sample give other tokens alone."""
        wrong = 0
        for request, token_ids in each(self.finished, "run again one by one"):
            wrong += (await ask(self.stub, request)).token_ids != token_ids
        return wrong


async def leaked_pages(address: str, within_s: float = 10) -> int:
    """Pages in use by no request, once the worker is idle; what is still in use after `within_s` is leaked."""
    async with to_worker(address) as channel:
        end = time.monotonic() + within_s
        while True:
            report = await WorkerStub(channel).GetReport(GetReportRequest(), timeout=10)
            pages = report.pages
            leaked = pages.in_use + abs(pages.total - pages.free - pages.cached - pages.in_use)
            idle = not (leaked or report.running_requests or report.waiting_requests)
            if idle or time.monotonic() > end:
                return leaked
            await asyncio.sleep(0.1)


async def load_for(
    report: Report, soak: Soak, seconds: float, at_once: int, workers: dict[str, Running]
) -> list[dict[str, int]]:
    """Keeps the load up; resident MB of each worker after each twelfth of the time."""
    until, resident = time.monotonic() + seconds, list[dict[str, int]]()
    senders = [asyncio.create_task(soak.keep_sending(until)) for _ in range(at_once)]
    while (left := until - time.monotonic()) > 0:
        if seconds - left >= seconds * (len(resident) + 1) / LOOKS:
            resident.append({role: worker.rss_mb() for role, worker in workers.items()})
            say(f"{soak.counts['requests']} requests; {left:.0f} s left; resident MB {resident[-1]}")
            report.put(outcomes=dict(soak.counts), resident_mb=resident)
        await asyncio.sleep(min(left, 0.25))
    await asyncio.gather(*senders)
    return resident


@contextmanager
def settings(**sections: dict[str, float]) -> Iterator[str]:
    """A file of settings."""
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(sections, file)
        file.flush()
        yield file.name


async def run(
    report: Report, model: str, dtype: str, minutes: float, at_once: int, longest: int, reruns: int, seed: int
) -> None:
    """Starts the workers, loads them, looks what is left."""
    with (
        settings(
            prefill_worker={"pool_tokens": POOL_TOKENS, "host_cache_gib": HOST_CACHE_GIB},
            decode_worker={"pool_tokens": POOL_TOKENS},
        ) as file,
        running_worker("prefill", model, dtype, 1, "--config", file) as prefill,
        running_worker("decode", model, dtype, 1, "--config", file) as decode,
    ):
        workers = {"prefill": prefill, "decode": decode}
        say("starting a prefill and a decode worker")
        _, about = await ready([prefill.address, decode.address])
        async with to_worker(decode.address, "decode") as channel:
            soak = Soak(DecodeStub(channel), prefill.address, about, random.Random(seed), longest, reruns)
            resident = await load_for(report, soak, 60 * minutes, at_once, workers)
            leaked = {role: await leaked_pages(worker.address) for role, worker in workers.items()}
            end = {role: worker.rss_mb() for role, worker in workers.items()}
            wrong = await soak.differing()
        early = resident[LOOKS // 3 - 1]
        peak = {role: worker.peak_rss_mb() for role, worker in workers.items()}
    figures = {
        "minutes": minutes,
        "requests": soak.counts["requests"],
        "rss_mb": {"start": sum(early.values()), "end": sum(end.values())},
        "leaked_pages": sum(leaked.values()),
        "rerun": {"requests": len(soak.finished), "differing": wrong},
        "outcomes": dict(soak.counts),
        "workers": {
            role: {
                "start": early[role],
                "end": end[role],
                "peak": peak[role],
                "each_twelfth": [look[role] for look in resident],
            }
            for role in workers
        },
    }
    report.put(**figures)


def main(
    model: Annotated[str, typer.Option(help="What the workers serve.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="Of their weights.")] = "auto",
    minutes: Annotated[float, typer.Option(min=0.05, help="How long the load lasts.")] = 30,
    at_once: Annotated[int, typer.Option(min=1, help="Requests at any time.")] = 12,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 1024,
    reruns: Annotated[int, typer.Option(min=0, help="Finished requests that are run again one by one.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the load.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Loads two workers at random and looks for leaks and wrong tokens."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("ISTHMUS_BF16", "never")  # answers are compared: none may depend on its batch
    with Report(json) as report:
        report.put(conditions=conditions(model=model, dtype=dtype, at_once=at_once, longest=longest, seed=seed))
        asyncio.run(run(report, model, dtype, minutes, at_once, longest, reruns, seed))
    if report.figures["leaked_pages"] or report.figures["rerun"]["differing"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
