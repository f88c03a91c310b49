"""Runs the jobs of one gateway: claims them, answers their requests, keeps its lease.

Requests of interactive and standard jobs start in this order, jobs of one class taking turns; those of batch jobs start
as `capacity` allows. A job that another gateway took, or that was cancelled or has expired, stops here at once.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from ....proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from ....proto.errors import IsthmusError
from ....proto.generation_pb2 import GenerateRequest
from ....proto.jobs_pb2 import JobError, JobEvent, JobOutput
from ....proto.tasks import Tasks
from ....proto.worker_pb2 import WorkerReport
from ...access.access import Access
from ...access.settings import NO_LIMITS
from ...access.usage import Permit
from ..settings import JobsSettings
from ..states import JobState
from ..store.store import JobStore
from .active import ActiveJob
from .answer import Answer, RequestRunner
from .batch_limit import PERIOD_S, BatchLimit, load_of
from .held import HeldJobs
from .recorder import TRIES, Recorder

log = logging.getLogger(__name__)

CLAIM = 32  # jobs of a class that are held ready beyond those that run
Classes = tuple[int, ...]  # priorities that share their room
CLASSES: tuple[Classes, ...] = ((PRIORITY_INTERACTIVE, PRIORITY_STANDARD), (PRIORITY_BATCH,))
RETRY_S = 0.5  # before a database that failed is asked again
WATCH_POLL_S = 0.25  # between looks for events that other gateways have recorded


class Runner:
    """Belongs to one event loop; `start`, then `stop`."""

    def __init__(
        self,
        store: JobStore,
        generator: RequestRunner,
        fingerprint: str,
        settings: JobsSettings,
        *,
        reports: Callable[[], Sequence[WorkerReport]],
        others: Callable[[], int],
        access: Access,
        tasks: Tasks,
    ) -> None:
        """`reports` are the workers' last ones, `others` the number of requests at the gateway that are no jobs;
        `access` says how much a tenant's jobs may have."""
        self._store = store
        self._generator = generator
        self._fingerprint = fingerprint
        self._settings = settings
        self._reports = reports
        self._others = others
        self._batch_limit = BatchLimit(settings.max_running_batch)
        self._jobs: dict[str, ActiveJob] = {}
        self._ready: dict[int, deque[ActiveJob]] = {priority: deque() for group in CLASSES for priority in group}
        self._held = HeldJobs()
        self._access = access
        self._running = {True: 0, False: 0}  # requests, by whether they are batch
        self._unclaimed = dict.fromkeys(CLASSES, True)  # whether there may be jobs to claim
        self._wake = asyncio.Event()
        self._background = tasks
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, address: str) -> None:
        """Takes up a lease as the gateway at `address`, and work with it."""
        self._address = address
        await self._join()
        self._store.bus.listeners.append(self._on_state)
        loops = (self._schedule, self._sweep, self._prune, self._look_at_workers, self._look_for_events)
        self._tasks = [
            self._background.start(f"jobs {loop.__name__.strip('_')}", partial(_forever, loop)) for loop in loops
        ]

    async def stop(self) -> None:
        """Stops all requests, records what they have made, and leaves their jobs to other gateways."""
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        await self._background.end(*tasks)
        self._store.bus.listeners.remove(self._on_state)
        await self._drop_all()
        with contextlib.suppress(TimeoutError, IsthmusError):
            async with asyncio.timeout(self._settings.lease_s):
                await self._recorder.drained()
                await self._store.leave(self._id)
        await self._end_recording()

    @property
    def failing(self) -> list[str]:
        """Background tasks that fail again and again."""
        return self._background.failing

    async def _join(self) -> None:
        self._id = secrets.token_hex(12)
        self._recorder = Recorder(self._store, self._id, self._drop, self._background)
        await self._store.join(self._id, self._address)
        self._recording = self._background.start("jobs recorder", self._recorder.run)
        self._look_for_work()

    async def _end_recording(self) -> None:
        await self._background.end(self._recording)

    def _look_for_work(self) -> None:
        self._unclaimed = dict.fromkeys(CLASSES, True)
        self._wake.set()

    def _on_state(self, job_id: str, event: JobEvent) -> None:
        state = JobState(event.state)
        if state is JobState.QUEUED:
            self._look_for_work()
        elif state.ended:
            self._drop(job_id)

    async def _schedule(self) -> None:
        self._wake.clear()
        for job in self._held.released(time.monotonic()):
            self._ready[job.priority].append(job)
            self._look_for_work()
        for classes in CLASSES:
            await self._start_some(classes)
        await self._wake.wait()

    async def _start_some(self, classes: Classes) -> None:
        """Starts as many requests of these classes as there is room for."""
        while (room := self._room(classes)) > 0:
            if self._unclaimed[classes] and sum(len(self._ready[priority]) for priority in classes) < room:
                await self._claim(classes, room + CLAIM)
            job = next((queue.popleft() for priority in classes if (queue := self._ready[priority])), None)
            if job is None:
                return
            await self._load(job)
            if job.job_id not in self._jobs or not job.pending:
                continue
            if (permit := self._permit(job, job.pending[0])) is None:
                continue
            self._run(job, job.pending.popleft(), permit)
            if job.pending or not job.all_loaded:
                self._ready[job.priority].append(job)

    def _permit(self, job: ActiveJob, row: Mapping[Any, Any]) -> Permit | None:
        """Leave for a request to begin; None where its tenant has used up its limits: then the job is held."""
        if not self._held.holds(job.tenant):
            prompt_tokens = row["prompt_tokens"]
            permit = self._access.begin_job(job.tenant, prompt_tokens, row["cost_tokens"] - prompt_tokens)
            if isinstance(permit, Permit):
                return permit
            self._held.hold(job.tenant, time.monotonic() + permit)
            asyncio.get_running_loop().call_later(permit, self._wake.set)
        self._held.add(job)
        return None

    def _room(self, classes: Classes) -> int:
        batch = PRIORITY_BATCH in classes
        return (self._batch_limit.target if batch else self._settings.max_running) - self._running[batch]

    async def _claim(self, classes: Classes, limit: int) -> None:
        held = self._held.tenants
        claimed = await self._store.claim(self._id, self._fingerprint, classes, limit, held)
        self._unclaimed[classes] = len(claimed) == limit
        for entry in claimed:
            job = ActiveJob(entry)
            self._jobs[job.job_id] = job
            self._ready[job.priority].append(job)

    async def _load(self, job: ActiveJob) -> None:
        """Reads the job's next page of requests where none is there; it stays the next job where that fails."""
        if job.pending or job.all_loaded:
            return
        try:
            job.take(await self._store.waiting(job.job_id, job.last_item, ActiveJob.PAGE))
        except IsthmusError:
            self._ready[job.priority].appendleft(job)
            raise
        except Exception as error:  # a bug: it shall not be in the way of the others
            job.bugs += 1
            if job.bugs < TRIES:
                self._ready[job.priority].append(job)
                raise
            self._background.note("jobs schedule", error, job.job_id)
            why = f"its requests cannot be read ({type(error).__name__}); see the gateway's log"
            await self._store.fail(job.job_id, self._id, JobError(code="UNKNOWN", message=why))
            self._drop(job.job_id)

    def _run(self, job: ActiveJob, row: Mapping[Any, Any], permit: Permit) -> None:
        item, about = row["item"], f"{job.job_id}.{row['item']}"
        request = GenerateRequest()
        with self._background.noted("jobs answer", about):
            request = job.request_of(row)
        answer = Answer(job.job_id, item, request, row["cost_tokens"], self._recorder, batch=job.is_batch)
        if not request.request_id:
            answer.fail(ValueError("what is kept of the request cannot be read"))
            permit.close(time.monotonic(), refused=True)
            return
        task = self._background.once(
            "jobs answer", partial(self._answer, job, item, answer), about=about, on_failure=answer.fail
        )
        job.running[item] = task
        self._running[job.is_batch] += 1
        task.add_done_callback(lambda _: self._ended(job, item, answer, permit))

    async def _answer(self, job: ActiveJob, item: int, answer: Answer) -> None:
        if job.has_output:
            answer.resume(await self._recorded(job.job_id, item))
        await answer.run(self._generator, job.time_left, self._access.limits_of(job.tenant) or NO_LIMITS)

    async def _recorded(self, job_id: str, item: int) -> Sequence[JobOutput]:
        """What there is of an answer; waits for the database where that fails."""
        while True:
            try:
                return await self._store.outputs(job_id, item)
            except IsthmusError as error:
                _note_wait(error)
                await asyncio.sleep(RETRY_S)

    def _ended(self, job: ActiveJob, item: int, answer: Answer, permit: Permit) -> None:
        permit.output_tokens = answer.output_tokens
        permit.close(time.monotonic(), refused=False)
        self._held.hold(job.tenant, 0.0)  # it has some room again
        del job.running[item]
        self._running[job.is_batch] -= 1
        self._wake.set()

    def _drop(self, job_id: str) -> None:
        """Stops what runs of a job."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            job.pending.clear()
            self._held.remove(job)
            with contextlib.suppress(ValueError):
                self._ready[job.priority].remove(job)
            for task in job.running.values():
                task.cancel()
            self._wake.set()

    async def _drop_all(self) -> None:
        tasks = [task for job in self._jobs.values() for task in job.running.values()]
        for job_id in list(self._jobs):
            self._drop(job_id)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sweep(self) -> None:
        """Keeps the lease; finds jobs that are not ours any more, and such as other gateways have left."""
        await asyncio.sleep(self._settings.sweep_s)
        if not await self._store.renew(self._id):
            log.error("this gateway was taken for dead: its jobs run elsewhere", extra={"fields": {"lease": self._id}})
            await self._drop_all()
            await self._end_recording()
            await self._join()
            return
        running = set(self._jobs)  # before the query: what is claimed meanwhile is not in its answer
        for job_id in running - await self._store.owned(self._id):
            self._drop(job_id)
        self._look_for_work()

    async def _prune(self) -> None:
        await asyncio.sleep(self._settings.prune_s)
        while await self._store.erase():
            await asyncio.sleep(0.01)  # others' changes come between

    async def _look_at_workers(self) -> None:
        begun_s = time.monotonic()
        await asyncio.sleep(PERIOD_S)
        lag_s = time.monotonic() - begun_s - PERIOD_S
        others = self._others() + self._running[False]
        if self._batch_limit.update(load_of(self._reports(), others, lag_s)) > self._running[True]:
            self._wake.set()

    async def _look_for_events(self) -> None:
        await asyncio.sleep(WATCH_POLL_S)
        watched = [job_id for job_id in self._store.bus.watched if job_id not in self._jobs]
        if watched:
            self._store.bus.publish_last(watched, await self._store.last_events(watched))


async def _forever(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs one round after the other; a database that fails now is asked again in a moment."""
    while True:
        try:
            await loop()
        except IsthmusError as error:
            _note_wait(error)
            await asyncio.sleep(RETRY_S)


def _note_wait(error: IsthmusError) -> None:
    fields = {"why": str(error), "private": error.private}
    log.warning("jobs wait for their database", extra={"fields": fields})
