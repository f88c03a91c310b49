"""One request of a job on the workers: from what is recorded of it to its end, however often it must be tried."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ....proto.backoff import backoff_s
from ....proto.common_pb2 import FINISH_REASON_UNSPECIFIED
from ....proto.errors import Exhausted, Expired, IsthmusError, Unavailable
from ....proto.generation_pb2 import GenerateEvent, GenerateRequest
from ....proto.jobs_pb2 import JobError, JobOutput, JobResult
from ....proto.rpc.statuses import code_of, status_of_bug
from ...access.settings import NO_LIMITS, Limits
from ...requests.request import ResolvedRequest
from ...requests.suspicion import Suspicion
from ..states import JobState
from .recorder import Recorder

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0  # before a request that found no worker, or no room, is tried again

PassOn = Callable[[GenerateEvent], Awaitable[None]]


class RequestRunner(Protocol):
    """What answers requests (`cluster/requests/generator.py`)."""

    async def resolve(self, request: GenerateRequest, /) -> ResolvedRequest: ...
    async def run(
        self,
        request: ResolvedRequest,
        pass_on: PassOn,
        /,
        *,
        emitted: Sequence[int],
        time_left: Callable[[], float | None],
        suspicion: Suspicion,
    ) -> Any: ...


class Answer:
    """The answer to one request of a job. `run` once."""

    def __init__(
        self,
        job_id: str,
        item: int,
        request: GenerateRequest,
        cost_tokens: int,
        recorder: Recorder,
        *,
        batch: bool,
    ) -> None:
        """`request` is complete: with the job's tenant and priority, and a seed."""
        self._job_id, self._item = job_id, item
        self._request = request
        self._cost_tokens = cost_tokens
        self._recorder = recorder
        self._batch = batch
        self._result = JobResult(request_index=item, request_id=request.request_id)
        self._texts: list[str] = []
        self._over = False

    def resume(self, outputs: Sequence[JobOutput]) -> None:
        """Takes in what is recorded already."""
        for output in outputs:
            self._take(output)

    @property
    def output_tokens(self) -> int:
        """So far."""
        return len(self._result.token_ids)

    async def run(
        self, generator: RequestRunner, time_left: Callable[[], float | None], limits: Limits = NO_LIMITS
    ) -> None:
        """Returns when the end is given to the recorder, or the deadline has passed.

        No worker and no room are no reason to give up before that: the request is tried again, from where it is. One
        that engines die of is (`cluster/requests/suspicion.py`).
        """
        failures, suspicion = 0, Suspicion()
        while True:
            had = len(self._result.token_ids)
            try:
                resolved = replace(await generator.resolve(self._request), limits=limits)
                emitted = list(self._result.token_ids)
                await generator.run(resolved, self._pass_on, emitted=emitted, time_left=time_left, suspicion=suspicion)
                return
            except (Unavailable, Exhausted) as error:
                fields = {"job_id": self._job_id, "item": self._item, "why": str(error)}
                log.info("a request of a job is tried again", extra={"fields": fields})
            except Expired as error:
                left = time_left()
                if left is not None and left <= 0:
                    return
                log.warning("a worker ended a request early", extra={"fields": {"why": str(error)}})
            except IsthmusError as error:
                return self._fail(code_of(error).name, str(error))
            except Exception as error:
                return self.fail(error)
            failures = 1 if len(self._result.token_ids) > had else failures + 1
            await asyncio.sleep(backoff_s(failures, FIRST_PAUSE_S, LAST_PAUSE_S) * random.uniform(0.5, 1.0))

    def fail(self, bug: Exception) -> None:
        """Ends the request for a bug, unless it has ended: nobody shall wait for it for ever."""
        if not self._over:
            status = status_of_bug(bug, "a request of a job")
            self._fail(status.code.name, status.details)

    async def _pass_on(self, event: GenerateEvent) -> None:
        output = _output(self._item, event)
        if output is not None:
            self._take(output)
            self._recorder.output(self._job_id, self._item, output, batch=self._batch)
        if event.finish_reason != FINISH_REASON_UNSPECIFIED:
            self._end(JobState.SUCCEEDED, None)
        await self._recorder.room()

    def _take(self, output: JobOutput) -> None:
        self._texts.append(output.text)
        self._result.token_ids.extend(output.token_ids)
        self._result.logprobs.extend(output.logprobs)
        if output.finish_reason != FINISH_REASON_UNSPECIFIED:
            self._result.finish_reason = output.finish_reason
            self._result.usage.CopyFrom(output.usage)
            self._result.timings.CopyFrom(output.timings)

    def _fail(self, code: str, message: str) -> None:
        error = JobError(code=code, message=message)
        output = JobOutput(request_index=self._item, index=len(self._result.token_ids), error=error)
        self._recorder.output(self._job_id, self._item, output, batch=False)
        self._end(JobState.FAILED, error)

    def _end(self, state: JobState, error: JobError | None) -> None:
        self._over = True
        self._result.state = state.value  # pyright: ignore[reportAttributeAccessIssue]
        self._result.text = "".join(self._texts)
        if error is not None:
            self._result.error.CopyFrom(error)
        self._recorder.end(
            self._job_id,
            self._item,
            state,
            result=self._result.SerializeToString(),
            cost_tokens=self._cost_tokens,
            error=error,
        )


def _output(item: int, event: GenerateEvent) -> JobOutput | None:
    """The event of a job for one of the gateway's; None where it says nothing."""
    finished = event.finish_reason != FINISH_REASON_UNSPECIFIED
    if not (event.text or event.token_ids or finished):
        return None
    output = JobOutput(
        request_index=item,
        text=event.text,
        token_ids=event.token_ids,
        index=event.index,
        logprobs=event.logprobs,
        finish_reason=event.finish_reason,
    )
    if finished:
        output.usage.CopyFrom(event.usage)
        output.timings.CopyFrom(event.timings)
    return output
