"""Brings a file of requests through the Jobs service: in pieces, each a job, several of them under way at once.

A piece's idempotency key is made of the run and its lines, so a run that goes on after an interruption finds the jobs
that it had submitted, and nothing is computed twice.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from ...proto.errors import InvalidRequest
from ...proto.jobs_pb2 import Job, JobResult, SubmitJobRequest
from ...proto.rpc.statuses import incident_of
from ..jobs.states import JobState
from .batch_lines import BadLine, Line, read_lines
from .batch_output import BatchFiles
from .jobs import JobsClient
from .submission import new_submission

POLL_S = 0.5
FULL_PAUSE_S = 2.0  # before a submission that found no room is tried again
PIECE_BYTES = 2 << 20
# What may be one request's fault.
REFUSED = (
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND),
    *(grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.OUT_OF_RANGE),
)
TOO_LARGE = "larger than max"  # in gRPC's words for a message that is beyond a limit


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run goes."""

    model: str  # that is served, for the answers
    instead: str  # of the model that the lines name; empty: theirs
    priority: str
    tenant: str
    piece: int  # requests in one job
    under_way: int  # jobs at once
    ordered: bool


@dataclass
class Tally:
    """What a run has done so far."""

    answered: int = 0
    failed: int = 0


OnProgress = Callable[[Tally], None]


class BatchRun:
    """`run` once; what it wrote stays right however it ends."""

    def __init__(
        self, client: JobsClient, source: Path, files: BatchFiles, plan: Plan, on_progress: OnProgress
    ) -> None:
        """`on_progress` is called with each change of the tally."""
        self._client = client
        self._source = source
        self._files = files
        self._plan = plan
        self._on_progress = on_progress
        self._tally = Tally()
        self._counted: dict[str, int] = {}  # requests of jobs under way that have ended

    async def run(self) -> Tally:
        """To the end of the file; the numbers of requests answered and of lines in the error file."""
        self._tally.answered = len(self._files.done)
        under_way: deque[asyncio.Task[None]] = deque()
        last: asyncio.Event | None = None
        try:
            for piece in self._pieces():
                while len(under_way) >= self._plan.under_way:
                    await self._oldest(under_way)
                before, last = last, asyncio.Event()
                waits_for = before if self._plan.ordered else None
                under_way.append(asyncio.create_task(self._piece(piece, waits_for, last)))
            while under_way:
                await self._oldest(under_way)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            self._files.sync()
        return self._tally

    async def _oldest(self, under_way: "deque[asyncio.Task[None]]") -> None:
        """Waits for a piece: in order for the oldest one, else for any."""
        if self._plan.ordered:
            await under_way[0]
            under_way.popleft()
            return
        done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            under_way.remove(task)
            task.result()

    def _pieces(self) -> Iterator[list[Line]]:
        """Groups of lines, the same ones at every run; those that are done altogether are left out."""
        piece, size = list[Line](), 0
        for line in read_lines(self._source, model=self._plan.instead):
            if isinstance(line, BadLine):
                if line.number not in self._files.done:
                    self._files.bad(line)
                    self._note(failed=1)
                continue
            bytes_in = line.request.ByteSize()
            if piece and (len(piece) == self._plan.piece or size + bytes_in > PIECE_BYTES):
                yield from self._unless_done(piece)
                piece, size = [], 0
            piece.append(line)
            size += bytes_in
        yield from self._unless_done(piece)

    def _unless_done(self, piece: list[Line]) -> Iterator[list[Line]]:
        if any(line.number not in self._files.done for line in piece):
            yield piece

    async def _piece(self, piece: list[Line], before: asyncio.Event | None, written: asyncio.Event) -> None:
        """From submission to the output file; writes after the piece `before`, if that is to be waited for.

        A piece that fails is never `written`, so that nothing is written past a gap.
        """
        jobs = [job async for job in self._submitted(piece)]
        finished = [(lines, await self._ended(job.job_id)) for lines, job in jobs]
        if before is not None:
            await before.wait()
        for lines, job in finished:
            await self._write(lines, job)
        self._files.sync()
        written.set()
        for _, job in finished:
            await self._client.delete(job.job_id)

    async def _submitted(self, piece: list[Line]) -> AsyncIterator[tuple[list[Line], Job]]:
        """The jobs of a piece: one, unless some of its requests are refused, which go to the error file."""
        key = hashlib.sha256(f"{self._files.run_id} {[line.number for line in piece]}".encode()).hexdigest()
        submission = new_submission(
            [line.request for line in piece],
            priority=self._plan.priority,
            tenant=self._plan.tenant,
            labels={"batch": self._files.run_id},
            key=key,
        )
        try:
            yield piece, await self._submit(submission)
            return
        except grpc.aio.AioRpcError as error:
            if not _is_refused(error):
                raise
            if len(piece) == 1:
                self._refuse(piece[0], error.code().name, error.details() or "")
                return
        middle = len(piece) // 2
        for half in (piece[:middle], piece[middle:]):
            async for job in self._submitted(half):
                yield job

    async def _submit(self, submission: SubmitJobRequest) -> Job:
        """Waits where there is no room for more jobs, as long as some of this run are under way."""
        while True:
            try:
                return await self._client.submit(submission)
            except grpc.aio.AioRpcError as error:
                full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not _is_refused(error)
                if not full or not self._counted:
                    raise
            await asyncio.sleep(FULL_PAUSE_S)

    async def _ended(self, job_id: str) -> Job:
        self._counted[job_id] = 0
        while True:
            job = await self._client.job(job_id)
            ended = job.succeeded_count + job.failed_count
            self._note(answered=ended - self._counted[job_id])
            self._counted[job_id] = ended
            if JobState(job.state).ended:
                return job
            await asyncio.sleep(POLL_S)

    async def _write(self, lines: list[Line], job: Job) -> None:
        found = self._client.results(job.job_id)
        async for result in found:
            line = lines[result.request_index]
            if line.number in self._files.done:
                continue
            if result.state == JobState.SUCCEEDED:
                self._files.answer(line, result, self._plan.model)
            else:
                self._fail(line, result)
        del self._counted[job.job_id]

    def _fail(self, line: Line, result: JobResult) -> None:
        state = JobState(result.state).name
        code, message = result.error.code or state, result.error.message or f"the job was {state.lower()}"
        self._files.error(line.number, line.custom_id, code, message)
        self._note(answered=-1, failed=1)

    def _refuse(self, line: Line, code: str, message: str) -> None:
        if line.number not in self._files.done:
            self._files.error(line.number, line.custom_id, code, message)
            self._note(failed=1)

    def _note(self, *, answered: int = 0, failed: int = 0) -> None:
        self._tally.answered += answered
        self._tally.failed += failed
        self._on_progress(self._tally)


def _is_refused(error: grpc.aio.AioRpcError) -> bool:
    """Whether it would be refused again, whoever asked and whenever."""
    code, details = error.code(), error.details() or ""
    too_large = code is grpc.StatusCode.RESOURCE_EXHAUSTED and TOO_LARGE in details
    # A bug of the gateway, which another request need not come upon.
    return too_large or bool(incident_of(error)) or code in REFUSED


def check_lines(source: Path, served: str, instead: str) -> int:
    """How many lines there are, bad ones too. InvalidRequest where one wants a model that is not served."""
    count = 0
    for line in read_lines(source):
        count += 1
        if isinstance(line, Line) and not instead and line.request.model not in ("", served):
            raise InvalidRequest(
                f"{source}, line {line.number} is for model {line.request.model!r}, and the cluster serves {served}; "
                f"to run all lines on that: --model {served}"
            )
    return count
