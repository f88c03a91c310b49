"""Answers requests on the workers of a fleet, with no client's connection in the way: for the API and for jobs."""

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ...kvtransfer.hashing import SCOPE_BYTES
from ...proto.errors import Unavailable
from ...proto.generation_pb2 import GenerateRequest
from ...proto.rpc.trace import TraceContext
from ...proto.worker_pb2 import Explanation
from ..fleet.registry import Fleet
from ..fleet.shortage import Shortage
from ..gateway_config import GatewayConfig
from ..router.router import servable_codecs
from ..router.routing_table import RoutingTable
from ..text.served import ServedModel
from .admission_queue import AdmissionQueue
from .attempt import PassOn
from .dispatch import Dispatcher, Near, TimeLeft
from .request import ResolvedRequest, resolve, smaller
from .request_log import RequestLog
from .session import Session, new_session
from .suspicion import Suspicion

GRACE_S = 1.0  # a connection to a worker that was lost is often back at once


def no_deadline() -> None:
    """The time left of a request that may take as long as it takes."""


class Generator:
    """One model on the workers of one fleet."""

    def __init__(
        self,
        model: ServedModel,
        fleet: Fleet,
        config: GatewayConfig,
        shortage: Shortage | None = None,
        *,
        log_content: bool = False,
    ) -> None:
        """`shortage`: told of requests that wait, where a supervisor starts workers for them."""
        self._shortage = shortage
        self._model = model
        self.log = RequestLog(model, content=log_content)
        self._fleet = fleet
        self._config = config
        self._admission = AdmissionQueue(fleet.table, config)
        self._dispatcher = Dispatcher(fleet, model.fingerprint, config, shortage)

    async def resolve(self, request: GenerateRequest) -> ResolvedRequest:
        """Validates and completes a request; raises what is wrong with it, Unavailable where nothing can serve it."""
        table = await self._usable_workers()
        default_codec = self._fleet.table.default_codec()
        resolved = await resolve(request, self._model, table, default_codec, self._config.local_prefill)
        if self._config.prefix_sharing == "none":
            return replace(resolved, prefix_scope=secrets.token_bytes(SCOPE_BYTES))
        return resolved

    def check_budget(self, request: ResolvedRequest) -> None:
        """InvalidRequest where a request, for one answer or for several, asks for more than it may have."""
        self._admission.check_budget(request)

    async def explain(self, request: GenerateRequest) -> Explanation:
        """What a request would cost on which workers; raises as `resolve`, and where nothing fits."""
        resolved = await self.resolve(request)
        return Explanation(
            policy=self._config.policy,
            local_prefill=self._config.local_prefill,
            prompt_tokens=len(resolved.prompt_token_ids),
            output_tokens=self._fleet.table.routing.output_tokens,
            candidates=self._dispatcher.explain(resolved),
        )

    async def run(
        self,
        request: ResolvedRequest,
        pass_on: PassOn,
        *,
        emitted: Sequence[int] = (),
        time_left: TimeLeft = no_deadline,
        trace: TraceContext = (),
        arrived_s: float | None = None,
        suspicion: Suspicion | None = None,
        begun: Callable[[Session], object] | None = None,
        near: Near | None = None,
    ) -> Session:
        """Answers a request: `pass_on` gets every event as it comes, the last one with usage and timings.

        `emitted` are tokens of the output that were passed on before, under the same seed: the answer goes on
        after them, in text, stop strings and indexes too, and none of them is passed on again. `arrived_s` is on
        the clock of time.monotonic(). `suspicion` is what earlier runs of the request have shown. `begun` gets the
        session before anything is passed on. `near`: see `Dispatcher.run`. Raises the
        IsthmusError that ended the request, and what `pass_on` raises; cancelling the task cancels the request
        everywhere.
        """
        arrived_s = time.monotonic() if arrived_s is None else arrived_s
        session = new_session(request, self._model, arrived_s)
        session.resume(emitted)
        if begun is not None:
            begun(session)
        with self.log.run(session):
            left = self._bounded(time_left, arrived_s, request.limits.max_request_s)
            prepared = functools.cache(lambda: self._dispatcher.prepare(request))
            async with self._admission.admit(request, left, lambda: self._dispatcher.estimate(request, prepared())):
                await self._dispatcher.run(
                    session, prepared(), pass_on, time_left=left, trace=trace, suspicion=suspicion, near=near
                )
        return session

    def _bounded(self, time_left: TimeLeft, arrived_s: float, own_s: float | None) -> TimeLeft:
        """The time left, with what a request may take at most: any one, or this one's caller's."""
        most_s = smaller(self._config.max_request_s, own_s)
        if most_s is None:
            return time_left

        def left() -> float:
            own, asked = arrived_s + most_s - time.monotonic(), time_left()
            return own if asked is None else min(own, asked)

        return left

    async def _usable_workers(self) -> RoutingTable:
        """The workers, as soon as some can serve: at once as a rule.

        A connection that was lost is often back within GRACE_S, and workers that were here lately are being restarted;
        where there never were any nobody waits for longer than that.
        """
        if servable_codecs(self._fleet.table.routing, self._config.local_prefill):
            return self._fleet.table.routing
        if self._shortage is not None and not self._config.wait_for_scale:
            self._refuse_cold(self._shortage)
        with self._shortage.waiting() if self._shortage is not None else contextlib.nullcontext():
            return await self._wait_usable()

    def _refuse_cold(self, shortage: Shortage) -> None:
        """Unavailable where a pool has no worker, with a hint when it may have one."""
        if empty := shortage.empty():
            shortage.refused()
            error = Unavailable(f"no {' and no '.join(sorted(empty))} worker is there; one is asked for: try again")
            error.retry_after_s = self._config.restart_wait_s
            raise error

    async def _wait_usable(self) -> RoutingTable:
        begun_s = time.monotonic()
        while not servable_codecs(self._fleet.table.routing, self._config.local_prefill):
            until_s = begun_s + (GRACE_S if self._shortage is None else self._config.restart_wait_s)
            if self._fleet.table.usable_s is not None:
                until_s = max(until_s, self._fleet.table.usable_s + self._config.restart_wait_s)
            change, left = self._fleet.change, until_s - time.monotonic()
            if left <= 0:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await change.wait()
        return self._fleet.table.routing
