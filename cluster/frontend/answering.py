"""One request from its arrival to its last event, whatever door it came in by."""

import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from ...proto.errors import Exhausted, Unavailable
from ...proto.generation_pb2 import GenerateEvent, GenerateRequest
from ...proto.rpc.streams import with_heartbeat
from ...proto.rpc.trace import TraceContext
from ..access.access import Access
from ..access.usage import Permit
from ..requests.attempt import PassOn
from ..requests.choices import run_choices
from ..requests.dispatch import TimeLeft
from ..requests.generator import Generator
from ..requests.request import ResolvedRequest
from .load import Load

Accepted = Callable[[ResolvedRequest], Awaitable[None]]


class Answering:
    """What all doors of a gateway share: limits of the caller, the load, and the answer itself."""

    def __init__(self, generator: Generator, load: Load, access: Access, sign_of_life_s: float) -> None:
        self._generator = generator
        self._load = load
        self._access = access
        self._sign_of_life_s = sign_of_life_s
        self.draining = False

    async def answer(
        self,
        request: GenerateRequest,
        write: PassOn,
        accepted: Accepted,
        *,
        time_left: TimeLeft,
        trace: TraceContext = (),
    ) -> None:
        """Answers a request of the caller that `Access.caller` names.

        `accepted` is called once, before anything is computed, with what the request was resolved to; `write` then
        gets every event, and one with nothing but the request's id where there is nothing to tell for a while. Raises
        the IsthmusError that ended the request, and what `write` raises; cancelling the task cancels everything below.
        """
        arrived_s = time.monotonic()
        with self._load.track(), ExitStack() as of_request:
            try:
                with self._generator.log.before_run(request, arrived_s):
                    resolved, permit = await self._admit(request, of_request)
                    await accepted(resolved)
                heartbeat = partial(GenerateEvent, request_id=resolved.request_id)
                counted = partial(_counted, write, permit)
                async with with_heartbeat(counted, heartbeat, self._sign_of_life_s) as pass_on:
                    await run_choices(
                        *(self._generator, resolved, pass_on), time_left=time_left, trace=trace, arrived_s=arrived_s
                    )
            except Exhausted as error:
                if error.retry_after_s is None:
                    error.retry_after_s = self._load.retry_after_s()
                raise

    async def _admit(self, request: GenerateRequest, of_request: ExitStack) -> tuple[ResolvedRequest, Permit]:
        if self.draining:
            raise Unavailable("the gateway is shutting down")
        caller = self._access.caller()
        request.tenant, request.priority = self._access.claimed(request.tenant, request.priority)
        permit = of_request.enter_context(self._access.running(caller))
        resolved = replace(await self._generator.resolve(request), limits=caller.limits)
        self._generator.check_budget(resolved)
        permit.reserve(len(resolved.prompt_token_ids), resolved.output_tokens, time.monotonic())
        return resolved, permit


async def _counted(write: PassOn, permit: Permit, event: GenerateEvent) -> None:
    """Counts what a caller is given, before it is."""
    permit.output_tokens += len(event.token_ids)
    await write(event)
