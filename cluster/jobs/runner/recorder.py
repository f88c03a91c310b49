"""Gathers what running requests make, and records it: one change at a time, with all that came since the last.

No token is shown before it is recorded (`jobs/database/writer.py`). Where the database fails, what was made
waits here and is tried again; nothing is dropped, and requests pause once too much waits.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from ....proto.backoff import backoff_s
from ....proto.errors import Exhausted, IllegalState, NotFound, Unavailable
from ....proto.jobs_pb2 import JobError, JobOutput
from ....proto.tasks import Tasks
from ..states import JobState
from ..store.progress import Progress
from ..store.store import JobStore

log = logging.getLogger(__name__)

BATCH_PERIOD_S = 0.1  # output of batch jobs is recorded this often: a crash costs that much computing, and no token
MAX_UNRECORDED_TOKENS = 20_000  # tokens that wait to be recorded before requests are paused
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
TRIES = 5  # of a job whose output cannot be recorded for another reason than the database's, before it is given up


class Recorder:
    """Belongs to one owner, and one event loop. `run` is its task."""

    def __init__(self, store: JobStore, owner: str, on_lost: Callable[[str], None], tasks: Tasks) -> None:
        """`on_lost` is called with jobs that turn out not to be the owner's any more."""
        self._store = store
        self._owner = owner
        self._on_lost = on_lost
        self._tasks = tasks
        self._made: dict[tuple[str, int], Progress] = {}
        self._unrecorded_tokens = 0
        self._some, self._urgent, self._all_recorded, self._has_room = (asyncio.Event() for _ in range(4))
        self._all_recorded.set()
        self._has_room.set()

    def output(self, job_id: str, item: int, output: JobOutput, *, batch: bool) -> None:
        """More output of a request. Of batch jobs what comes within a period becomes one event."""
        made = self._progress(job_id, item, urgent=not batch)
        if batch and made.outputs and len(output.token_ids):
            _append(made.outputs[-1], output)
        else:
            made.outputs.append(output)
        self._unrecorded_tokens += len(output.token_ids)
        if self._unrecorded_tokens > MAX_UNRECORDED_TOKENS:
            self._has_room.clear()

    def end(
        self, job_id: str, item: int, state: JobState, *, result: bytes, cost_tokens: int, error: JobError | None
    ) -> None:
        """The end of a request, after its last output."""
        made = self._progress(job_id, item, urgent=True)
        made.ended, made.result, made.cost_tokens, made.error = state, result, cost_tokens, error

    async def room(self) -> None:
        """Waits while too much is not recorded yet."""
        await self._has_room.wait()

    async def drained(self) -> None:
        """Waits until all is recorded."""
        self._urgent.set()
        await self._all_recorded.wait()

    async def run(self) -> None:
        """Records for as long as it runs."""
        while True:
            await self._some.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BATCH_PERIOD_S):  # wait_for can swallow a cancellation
                    await self._urgent.wait()
            made, self._made = list(self._made.values()), {}
            self._some.clear()
            self._urgent.clear()
            self._unrecorded_tokens = 0
            lost = await self._record(made)
            self._has_room.set()
            if not self._made:
                self._all_recorded.set()
            for job_id in lost:
                self._on_lost(job_id)

    async def _record(self, made: list[Progress]) -> frozenset[str]:
        """Records progress, however often that must be tried; returns the jobs that are not the owner's any more.

        Where it fails for a reason that may be one job's, each job is recorded alone; one that still cannot be ends as
        FAILED.
        """
        failures, bugs = 0, 0
        while True:
            try:
                return await self._store.record(self._owner, made)
            except (Unavailable, Exhausted) as error:
                fields = {"why": str(error), "private": error.private}
                log.warning("output of jobs cannot be recorded yet", extra={"fields": fields})
            except Exception as error:
                by_job: dict[str, list[Progress]] = {}
                for progress in made:
                    by_job.setdefault(progress.job_id, []).append(progress)
                self._tasks.note("jobs recorder", error, ", ".join(by_job))
                if len(by_job) > 1:
                    return frozenset().union(*await asyncio.gather(*map(self._record, by_job.values())))
                bugs += 1
                if bugs >= TRIES:  # this gateway has nothing more to do with it, and goes on with the others
                    await self._give_up(made[0].job_id, error)
                    return frozenset(by_job)
            failures += 1
            await asyncio.sleep(backoff_s(failures, FIRST_RETRY_S, LAST_RETRY_S))

    async def _give_up(self, job_id: str, bug: Exception) -> None:
        """Ends a job as FAILED, where that can be recorded."""
        why = f"its output cannot be recorded ({type(bug).__name__}); see the gateway's log"
        try:
            await self._store.fail(job_id, self._owner, JobError(code="UNKNOWN", message=why))
        except (IllegalState, NotFound):
            return
        except Exception as error:
            self._tasks.note("jobs recorder", error, job_id)

    def _progress(self, job_id: str, item: int, *, urgent: bool) -> Progress:
        self._all_recorded.clear()
        self._some.set()
        if urgent:
            self._urgent.set()
        key = (job_id, item)
        if key not in self._made:
            self._made[key] = Progress(job_id=job_id, item=item)
        return self._made[key]


def _append(output: JobOutput, more: JobOutput) -> None:
    """Makes one event of two that follow each other."""
    output.text += more.text
    output.token_ids.extend(more.token_ids)
    output.logprobs.extend(more.logprobs)
    output.finish_reason = more.finish_reason
    if more.HasField("usage"):
        output.usage.CopyFrom(more.usage)
        output.timings.CopyFrom(more.timings)
