"""`isthmus.v1.Jobs`: what clients ask of the jobs of a gateway."""

import asyncio
from collections.abc import Callable

import grpc.aio
from google.protobuf.empty_pb2 import Empty

from ....proto import jobs_pb2, jobs_pb2_grpc
from ....proto.common_pb2 import PRIORITY_UNSPECIFIED
from ....proto.errors import IllegalState, Unavailable
from ....proto.jobs_pb2 import Job, JobEvent, WatchJobResponse
from ...access.access import Access
from ...text.served import ServedModel
from ..settings import JobsSettings
from ..states import JobState
from ..store.store import JobStore
from .checks import checked, claim_job
from .listing import job_id, listing, page_size, page_token

SERVICE = jobs_pb2.DESCRIPTOR.services_by_name["Jobs"]


class JobsService(jobs_pb2_grpc.JobsServicer):
    """Answers from the store alone: any gateway of a database tells about all of its jobs."""

    def __init__(
        self,
        store: JobStore,
        model: ServedModel,
        settings: JobsSettings,
        default_codec: Callable[[], str],
        access: Access,
    ) -> None:
        self._store = store
        self._model = model
        self._settings = settings
        self._default_codec = default_codec
        self._access = access
        self.draining = False

    async def SubmitJob(self, request: jobs_pb2.SubmitJobRequest, context: object) -> Job:
        if self.draining:
            raise Unavailable("the gateway is shutting down: submit again, with the same idempotency key")
        claim_job(request, self._access)
        limits = self._access.caller().limits
        job = await checked(request, self._model, self._default_codec(), self._settings, limits)
        return await self._store.submit(job)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: object) -> Job:
        return await self._store.job(job_id(request.job_id), self._access.own_tenant())

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: object) -> jobs_pb2.ListJobsResponse:
        request.tenant = self._access.claimed(request.tenant, PRIORITY_UNSPECIFIED).tenant
        jobs, token = await self._store.jobs(listing(request))
        return jobs_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchJob(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        request: jobs_pb2.WatchJobRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.WatchJobRequest, WatchJobResponse],
    ) -> None:
        """What was committed in this process comes from the event bus; every gap in that is read from the database."""
        watched, wanted, tenant = job_id(request.job_id), max(1, request.from_event), self._access.own_tenant()
        await self._store.job(watched, tenant)  # what comes over the bus is anybody's
        with self._store.bus.subscribed(watched) as subscription:
            while True:
                events, over = _following(subscription.take(), wanted), False
                if not events:
                    job, events = await self._store.events(watched, wanted, tenant)
                    over = JobState(job.state).ended and wanted > job.last_event
                if events:
                    await context.write(WatchJobResponse(events=events))
                    wanted, over = events[-1].number + 1, _is_last(events[-1])
                if over:
                    return
                if subscription.last < wanted:
                    try:
                        async with asyncio.timeout(self._settings.sign_of_life_s):
                            await subscription.wait()
                    except TimeoutError:
                        await context.write(WatchJobResponse())  # a sign of life: proxies cut silent streams

    async def GetResult(self, request: jobs_pb2.GetResultRequest, context: object) -> jobs_pb2.GetResultResponse:
        limit, page = page_size(request.page_size), page_token(request.page_token)
        asked, tenant = job_id(request.job_id), self._access.own_tenant()
        job, results, token = await self._store.results(asked, limit, page, tenant)
        state = JobState(job.state)
        if not state.ended and not request.allow_partial:
            raise IllegalState(f"job {job.job_id} is {state.name}: wait for its end, or ask with allow_partial")
        return jobs_pb2.GetResultResponse(job=job, results=results, next_page_token=token)

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: object) -> Job:
        return await self._store.cancel(job_id(request.job_id), self._access.own_tenant())

    async def DeleteJob(self, request: jobs_pb2.DeleteJobRequest, context: object) -> Empty:
        await self._store.forget(job_id(request.job_id), self._access.own_tenant())
        return Empty()


def _following(events: list[JobEvent], wanted: int) -> list[JobEvent]:
    """The events from number `wanted` on, up to the first gap; none where that one is missing."""
    following = []
    for event in events:
        if event.number == wanted + len(following):
            following.append(event)
    return following


def _is_last(event: JobEvent) -> bool:
    return event.HasField("state") and JobState(event.state).ended
