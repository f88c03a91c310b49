"""A real gateway process, killed at random moments: no accepted job is lost, no token made or recorded twice."""

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from scripted import Scripted, report_of
from support.processes import ISTHMUS, free_port

from isthmus.cluster.client.jobs import JobsClient
from isthmus.cluster.text.served import load_served_model
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH, SamplingParams, TransferStats
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.jobs_pb2 import JOB_STATE_SUCCEEDED, SubmitJobRequest
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, ModelReport

MODEL = "smollm2-135m"
TOKENS, STEP_S = 40, 0.02


@pytest.fixture(autouse=True)
def _plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the gateway too: the workers are scripts in this process, which have no certificates."""
    monkeypatch.setenv("ISTHMUS_TLS", "off")


def tokens_for(request: DecodeRequest) -> list[int]:
    """The answer of the scripted worker: depends on the prompt, the seed and the position alone."""
    drawn = random.Random(f"{list(request.prompt_token_ids)} {request.sampling.seed}")
    return [drawn.randrange(300, 40_000) for _ in range(request.sampling.max_tokens)]


async def decode(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
    tokens, emitted = tokens_for(request), len(request.emitted_token_ids)
    assert tokens[:emitted] == list(request.emitted_token_ids)
    moved = TransferStats(kv_bytes_wire=1000 * len(request.prefill_addresses))  # what the gateway's canaries look for
    for position in range(emitted, len(tokens)):
        await asyncio.sleep(STEP_S)
        last = position + 1 == len(tokens)
        finish = FINISH_REASON_LENGTH if last else 0
        transfer = moved if last else None
        await context.write(DecodeEvent(token_ids=[tokens[position]], finish_reason=finish, transfer=transfer))


@asynccontextmanager
async def workers() -> AsyncIterator[list[str]]:
    """One of each role, for the real model's gateway; their addresses."""
    served = load_served_model(MODEL)
    report = ModelReport(
        name=served.name,
        fingerprint=served.fingerprint,
        context_length=served.context_length,
        vocab_size=served.vocab_size,
    )
    running = [
        Scripted(report_of(WORKER_ROLE_PREFILL, model=report)),
        Scripted(report_of(WORKER_ROLE_DECODE, model=report), decode),
    ]
    for worker in running:
        await worker.start()
    try:
        yield [worker.address for worker in running]
    finally:
        for worker in running:
            await worker.stop()


def command(server: str, addresses: list[str], url: str) -> list[str]:
    ports = ("--listen", server, "--admin-listen", f"127.0.0.1:{free_port()}")
    return [ISTHMUS, "gateway", *ports, "--workers", ",".join(addresses), "--model", MODEL, "--jobs-db", url]


def requests_of(count: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(prompt=f"Tell me about {number}.", sampling=SamplingParams(max_tokens=TOKENS, seed=number))
        for number in range(count)
    ]


async def test_jobs_of_a_gateway_that_is_killed_go_on_at_the_other(url: str) -> None:
    """Both have the same workers and the same database; a lease moves what the dead one ran."""
    servers = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    async with (
        workers() as addresses,
        JobsClient(servers[0], patience_s=60) as first,
        JobsClient(servers[1], patience_s=60) as second,
    ):
        gateways = [subprocess.Popen(command(server, addresses, url), env=os.environ) for server in servers]
        try:
            await second.submit(SubmitJobRequest(requests=requests_of(1)))  # it answers
            jobs = [await first.submit(SubmitJobRequest(requests=[request])) for request in requests_of(12)]
            async for _ in first.watch(jobs[0].job_id):
                break  # some run
            gateways[0].kill()
            await asyncio.to_thread(gateways[0].wait)
            resumes = 0
            for number, job in enumerate(jobs):
                async for _ in second.watch(job.job_id):
                    pass
                ended = await second.job(job.job_id)
                assert (ended.state, ended.output_tokens) == (JOB_STATE_SUCCEEDED, TOKENS)
                (result,) = [result async for result in second.results(job.job_id)]
                assert (result.timings.seed, len(result.token_ids)) == (number, TOKENS)
                resumes += ended.resumes
            assert resumes > 0, "the kill did hit running jobs"
        finally:
            for gateway in gateways:
                gateway.kill()
                await asyncio.to_thread(gateway.wait)


async def test_killed_at_random_no_job_is_lost_and_no_token_repeated(url: str) -> None:
    draw, server, requests = random.Random(7), f"127.0.0.1:{free_port()}", requests_of(24)
    async with workers() as addresses, JobsClient(server, patience_s=120) as client:
        gateway = subprocess.Popen(begun := command(server, addresses, url), env=os.environ)
        try:
            undisturbed = await client.submit(SubmitJobRequest(requests=requests))
            async for _ in client.watch(undisturbed.job_id):
                pass

            async def submit_and_watch(request: GenerateRequest) -> tuple[str, list[int], str]:
                await asyncio.sleep(draw.uniform(0, 3))
                job = await client.submit(SubmitJobRequest(requests=[request]))
                tokens, text, numbers = list[int](), "", list[int]()
                async for event in client.watch(job.job_id):
                    numbers.append(event.number)
                    assert event.output.index == len(tokens) or not event.output.token_ids
                    tokens += event.output.token_ids
                    text += event.output.text
                assert numbers == list(range(1, len(numbers) + 1))
                return job.job_id, tokens, text

            watching = asyncio.gather(*(submit_and_watch(request) for request in requests))
            for _ in range(3):
                await asyncio.sleep(draw.uniform(0.2, 1.0))
                gateway.send_signal(signal.SIGKILL)
                await asyncio.to_thread(gateway.wait)
                gateway = subprocess.Popen(begun, env=os.environ)
                await client.job(undisturbed.job_id)  # it answers again
            watched = await asyncio.wait_for(watching, 120)
            texts = [result.text async for result in client.results(undisturbed.job_id)]
            assert [text for _, _, text in watched] == texts
            resumes = 0
            for request, (job_id, tokens, _) in zip(requests, watched, strict=True):
                job = await client.job(job_id)
                assert (job.state, job.output_tokens) == (JOB_STATE_SUCCEEDED, TOKENS)
                (result,) = [result async for result in client.results(job_id)]
                assert (list(result.token_ids), result.timings.seed) == (tokens, request.sampling.seed)
                resumes += job.resumes
            assert resumes > 0  # the kills did hit running jobs
        finally:
            gateway.terminate()
            await asyncio.to_thread(gateway.wait)
