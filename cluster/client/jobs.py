"""A client of the Jobs service that a gateway's restart does not disturb: it asks again, and a watcher goes on.

async with JobsClient("127.0.0.1:50051") as client:
    job = await client.submit(SubmitJobRequest(requests=[build_request(prompt="The sea is")]))
    async for event in client.watch(job.job_id):
        print(event.output.text, end="")
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self, TypeVar

import grpc.aio

from ...proto.backoff import backoff_s
from ...proto.errors import Unavailable
from ...proto.jobs_pb2 import (
    CancelJobRequest,
    DeleteJobRequest,
    GetJobRequest,
    GetResultRequest,
    Job,
    JobEvent,
    JobResult,
    ListJobsRequest,
    ListJobsResponse,
    SubmitJobRequest,
    WatchJobRequest,
    WatchJobResponse,
)
from ...proto.jobs_pb2_grpc import JobsStub
from ...proto.rpc.statuses import error_of
from ...proto.rpc.transport import Transport
from ..jobs.states import JobState
from .credentials import ApiKey, as_api_key, dial
from .security import client_security

CALL_S = 30.0
FIRST_PAUSE_S, LAST_PAUSE_S = 0.2, 2.0
T = TypeVar("T")


class JobsClient:
    """Calls one gateway, as an async context manager; raises grpc.aio.AioRpcError as the server sends it.

    A call that finds no gateway, or one whose database is busy, is tried again for `patience_s`.
    """

    def __init__(
        self,
        address: str,
        transport: Transport | None = None,
        *,
        patience_s: float = 0.0,
        api_key: ApiKey | str | None = None,
    ) -> None:
        """Dials through `transport`; by default one of its own, with the certificates that `client_security` finds.

        InvalidRequest where `api_key` would go to another host in plain text.
        """
        self.patience_s = patience_s
        self._channel = dial(address, transport or Transport(client_security(address)), as_api_key(api_key))
        self._stub: Any = JobsStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()

    async def submit(self, submission: SubmitJobRequest) -> Job:
        """Submits once, however often it must be tried: a key is drawn where the submission has none."""
        submission.idempotency_key = submission.idempotency_key or secrets.token_hex(16)
        return await self._patiently(lambda: self._stub.SubmitJob(submission, timeout=CALL_S))

    async def job(self, job_id: str) -> Job:
        """How a job stands."""
        return await self._patiently(lambda: self._stub.GetJob(GetJobRequest(job_id=job_id), timeout=CALL_S))

    async def jobs(self, request: ListJobsRequest) -> ListJobsResponse:
        """A page of jobs, newest first."""
        return await self._patiently(lambda: self._stub.ListJobs(request, timeout=CALL_S))

    async def cancel(self, job_id: str) -> Job:
        """Ends a job."""
        return await self._stub.CancelJob(CancelJobRequest(job_id=job_id), timeout=CALL_S)

    async def delete(self, job_id: str) -> None:
        """Forgets a job that has ended."""
        await self._stub.DeleteJob(DeleteJobRequest(job_id=job_id), timeout=CALL_S)

    async def results(self, job_id: str, *, partial: bool = False) -> AsyncIterator[JobResult]:
        """All answers of a job, in the order of its requests."""
        request = GetResultRequest(job_id=job_id, allow_partial=partial)
        while True:
            page = await self._patiently(lambda: self._stub.GetResult(request, timeout=CALL_S))
            for result in page.results:
                yield result
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def watch(self, job_id: str, from_event: int = 0) -> AsyncIterator[JobEvent]:
        """Every event from that number on, once, to the last one; lost connections are made again for `patience_s`."""
        wanted, tries = max(1, from_event), _Tries(self.patience_s)
        while True:
            call = self._stub.WatchJob(WatchJobRequest(job_id=job_id, from_event=wanted))
            try:
                while isinstance(answer := await call.read(), WatchJobResponse):
                    for event in answer.events:
                        wanted = event.number + 1
                        yield event
                        if event.HasField("state") and JobState(event.state).ended:
                            return
                    tries = _Tries(self.patience_s)
                return
            except grpc.aio.AioRpcError as error:
                await tries.failed(error)
            finally:
                call.cancel()

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        tries = _Tries(self.patience_s)
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                await tries.failed(error)


class _Tries:
    """The tries of one call, until it is answered."""

    def __init__(self, patience_s: float) -> None:
        self._until_s = time.monotonic() + patience_s
        self._failures = 0

    async def failed(self, error: grpc.aio.AioRpcError) -> None:
        """Waits before another try; raises the error where none would help, or there is no time for one."""
        self._failures += 1
        pause_s = backoff_s(self._failures, FIRST_PAUSE_S, LAST_PAUSE_S)
        if not isinstance(error_of(error), Unavailable) or time.monotonic() + pause_s > self._until_s:
            raise error
        await asyncio.sleep(pause_s)
