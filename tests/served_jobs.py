"""The Jobs service in this process, on a database of its own, with a generator that follows a script."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from scripted import Script, report_of, served

from isthmus.cluster.jobs.service.manager import Jobs
from isthmus.cluster.jobs.service.service import SERVICE
from isthmus.cluster.jobs.settings import JobsSettings
from isthmus.cluster.requests.request import ResolvedRequest, validate
from isthmus.cluster.requests.session import new_session
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.generation_pb2 import GenerateEvent, GenerateRequest
from isthmus.proto.jobs_pb2 import GetJobRequest, GetResultRequest, Job, JobEvent, JobResult, WatchJobRequest
from isthmus.proto.jobs_pb2_grpc import JobsStub
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerReport

ENDED = (3, 4, 5, 6)
QUICK = {"sweep_s": 0.1, "prune_s": 0.1, "lease_s": 1.0}

BeforeToken = Callable[[GenerateRequest, int], Awaitable[None]]  # (request, position in the output)


def answer_to(prompt: str, seed: int, length: int) -> list[int]:
    """What the model of bytes answers: lower-case letters that depend on prompt, seed and position."""
    start = sum(prompt.encode()) + seed
    return [97 + (start + 7 * position + position * position) % 26 for position in range(length)]


@dataclass
class ScriptedGenerator:
    """Answers at once, or as `before` lets it; notes what it was asked to go on from."""

    before: BeforeToken | None = None
    asked: list[tuple[str, int]] = field(default_factory=list)  # (prompt, tokens that were there)
    running: int = 0
    most_running: int = 0

    async def resolve(self, request: GenerateRequest, /) -> ResolvedRequest:
        validated = await validate(request, served())
        self._request = request
        return ResolvedRequest(
            request_id=request.request_id,
            call_id=request.prompt,  # what `run` goes by
            prompt_token_ids=validated.prompt_token_ids,
            sampling=validated.sampling,
            codec=request.codec,
        )

    async def run(
        self,
        request: ResolvedRequest,
        pass_on: Callable[[GenerateEvent], Awaitable[None]],
        /,
        *,
        emitted: Sequence[int],
        time_left: Callable[[], float | None],
        suspicion: Any,
    ) -> None:
        prompt = request.call_id
        self.asked.append((prompt, len(emitted)))
        tokens = answer_to(prompt, request.sampling.seed, request.sampling.max_tokens)
        assert tokens[: len(emitted)] == list(emitted)
        session = new_session(request, served(), time.monotonic())
        session.push(DecodeEvent(token_ids=emitted), 0)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for position in range(len(emitted), len(tokens)):
                if self.before is not None:
                    await self.before(GenerateRequest(prompt=prompt), position)
                finish = FINISH_REASON_LENGTH if position + 1 == len(tokens) else 0
                event = DecodeEvent(token_ids=[tokens[position]], finish_reason=finish)
                await pass_on(session.push(event, time.monotonic()))
                if session.finished:
                    return
        finally:
            self.running -= 1


@dataclass
class JobsServer:
    """One gateway's jobs and a client of them."""

    jobs: Jobs
    stub: Any
    generator: ScriptedGenerator
    address: str

    async def ended(self, job_id: str, within_s: float = 10) -> Job:
        """The job, once it has ended."""
        async with asyncio.timeout(within_s):
            while True:
                job = await self.stub.GetJob(GetJobRequest(job_id=job_id))
                if job.state in ENDED:
                    return job
                await asyncio.sleep(0.01)

    async def watch(self, job_id: str, from_event: int = 0) -> list[JobEvent]:
        """All events of a job from a number on, once it has ended."""
        async with asyncio.timeout(20):
            call = self.stub.WatchJob(WatchJobRequest(job_id=job_id, from_event=from_event))
            return [event async for answer in call for event in answer.events]

    async def results(self, job_id: str, **fields: Any) -> list[JobResult]:
        """All answers of a job, page by page."""
        found, token = list[JobResult](), ""
        while True:
            page = await self.stub.GetResult(GetResultRequest(job_id=job_id, page_token=token, **fields))
            found += page.results
            token = page.next_page_token
            if not token:
                return found


def ready_workers() -> list[WorkerReport]:
    """One of each role."""
    return [report_of(role) for role in (WORKER_ROLE_PREFILL, WORKER_ROLE_DECODE)]


@asynccontextmanager
async def jobs_server(
    url: str,
    before: BeforeToken | None = None,
    *,
    others: Callable[[], int] = lambda: 0,
    address: str | None = None,
    **settings: Any,
) -> AsyncIterator[JobsServer]:
    """A server that runs jobs; ends in order, as with SIGTERM."""
    generator = ScriptedGenerator(before)
    jobs = await Jobs.open(
        url,
        served(),
        generator,
        default_codec=lambda: "raw",
        reports=ready_workers,
        others=others,
        settings=JobsSettings(**{**QUICK, **settings}),
    )
    transport = Transport()
    server = await transport.listen("127.0.0.1:0", {SERVICE: jobs.add_to})
    await jobs.start(address or f"host:{server.port}")
    try:
        async with transport.dial(f"127.0.0.1:{server.port}") as channel:
            yield JobsServer(jobs, JobsStub(channel), generator, address or f"host:{server.port}")
    finally:
        await jobs.drain()
        await server.stop()
        await jobs.stop()


def sqlite_url(folder: Path) -> str:
    """A database in a folder."""
    return f"sqlite:///{folder / 'jobs.db'}"


def expected_text(prompt: str, seed: int, length: int) -> str:
    """What a decode worker with the script `answering` makes of a prompt."""
    return bytes(answer_to(prompt, seed, length)).decode()


def answering(pause_s: float = 0.0) -> Script:
    """A decode worker's script: a token after each pause, those already emitted left out."""

    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        prompt = bytes(request.prompt_token_ids).decode()
        tokens = answer_to(prompt, request.sampling.seed, request.sampling.max_tokens)
        assert tokens[: len(request.emitted_token_ids)] == list(request.emitted_token_ids)
        for position in range(len(request.emitted_token_ids), len(tokens)):
            if pause_s:
                await asyncio.sleep(pause_s)
            finish = FINISH_REASON_LENGTH if position + 1 == len(tokens) else 0
            await context.write(DecodeEvent(token_ids=[tokens[position]], finish_reason=finish))

    return script
