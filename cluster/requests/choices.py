"""Several answers to one prompt: as many requests that share it, told apart in their events by `choice`.

The first one goes ahead. The others are placed where the KV of its prompt is, once it is there: they share its pages
and copy the end of the prompt that is no shared page, so that nothing is computed or sent again (docs/reuse.md).
All of them come to their ends together: where one fails, or the caller goes away, the others are cancelled.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol

from ...proto.common_pb2 import FINISH_REASON_UNSPECIFIED
from ...proto.generation_pb2 import GenerateEvent, Usage
from ...proto.rpc.trace import TraceContext
from ...proto.sampling import MAX_SEED
from ...proto.tasks import together
from .attempt import PassOn
from .dispatch import Near, TimeLeft
from .request import ResolvedRequest
from .session import Session


class Runner(Protocol):
    """What answers requests (`generator.py`)."""

    async def run(
        self,
        request: ResolvedRequest,
        pass_on: PassOn,
        /,
        *,
        time_left: TimeLeft,
        trace: TraceContext,
        arrived_s: float | None,
        begun: Callable[[Session], object] | None = None,
        near: Near | None = None,
    ) -> Any: ...


async def run_choices(
    runner: Runner,
    request: ResolvedRequest,
    pass_on: PassOn,
    *,
    time_left: TimeLeft,
    trace: TraceContext = (),
    arrived_s: float | None = None,
) -> None:
    """Runs a request for one answer or for several; `pass_on` gets the events of all of them.

    The last event of each answer has its finish reason and timings, that of the one that ends last the usage of all.
    Raises the IsthmusError that ended the first one to fail, and what `pass_on` raises.
    """

    async def run(choice: ResolvedRequest, write: PassOn, **where: Any) -> None:
        await runner.run(choice, write, time_left=time_left, trace=trace, arrived_s=arrived_s, **where)

    if request.sampling.n == 1:
        return await run(request, pass_on)
    choices = [_choice(request, number) for number in range(request.sampling.n)]
    counted = _Counted(pass_on, len(choices))
    ahead = _Ahead(counted)
    await together(
        [
            run(choices[0], ahead, begun=ahead.begin),
            *(_after(ahead, run, choice, counted) for choice in choices[1:]),
        ]
    )


def _choice(request: ResolvedRequest, number: int) -> ResolvedRequest:
    """The request for one of the answers, with a seed of its own. What is told once is told with the first."""
    sampling = replace(request.sampling, seed=(request.sampling.seed + number) & MAX_SEED)
    if number:
        sampling = replace(sampling, prompt_logprobs=None)
    return replace(
        request,
        choice=number,
        call_id=f"{request.call_id}-{number}",
        sampling=sampling,
        explain=request.explain and not number,
        return_prompt_token_ids=request.return_prompt_token_ids and not number,
    )


class _Counted:
    """Leaves the usage to the last event of all, which has that of all answers: the prompt counts once."""

    def __init__(self, pass_on: PassOn, choices: int) -> None:
        self._pass_on, self._left = pass_on, choices
        self._usage = Usage()

    async def __call__(self, event: GenerateEvent) -> None:
        if event.finish_reason != FINISH_REASON_UNSPECIFIED:
            self._left -= 1
            self._usage.prompt_tokens = event.usage.prompt_tokens
            self._usage.output_tokens += event.usage.output_tokens
            event.ClearField("usage")
            if not self._left:
                event.usage.CopyFrom(self._usage)
        await self._pass_on(event)


class _Ahead:
    """The first answer: knows when the prompt's KV is there, and where."""

    def __init__(self, pass_on: PassOn) -> None:
        self._pass_on = pass_on
        self._session: Session | None = None
        self._has_kv = asyncio.Event()

    def begin(self, session: Session) -> None:
        self._session = session

    async def __call__(self, event: GenerateEvent) -> None:
        if self._session is not None and self._session.has_kv:
            self._has_kv.set()
        await self._pass_on(event)

    async def place(self) -> Near:
        """Where the prompt is, as soon as it is there."""
        await self._has_kv.wait()
        assert self._session is not None
        session, transfer = self._session, self._session.transfer
        by_transfer = transfer is not None and not transfer.local_tokens
        return Near(session.decode_worker, session.decode_request_id, by_transfer=by_transfer)


async def _after(ahead: _Ahead, run: Callable[..., Awaitable[None]], choice: ResolvedRequest, write: PassOn) -> None:
    await run(choice, write, near=await ahead.place())
