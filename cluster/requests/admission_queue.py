"""The gateway's admission queue: requests wait here until the fair queue starts them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from ...proto.errors import Expired, InvalidRequest
from ..fleet.worker_table import WorkerTable
from ..gateway_config import GatewayConfig
from ..router.estimates import LatencyEstimate
from .fair_queue import Claim, FairQueue, Ticket
from .request import ResolvedRequest, smaller

RECHECK_S = 1.0  # capacity changes with the workers, too


class AdmissionQueue:
    """Admits requests; belongs to one event loop."""

    def __init__(self, workers: WorkerTable, config: GatewayConfig) -> None:
        self._workers, self._config = workers, config
        self._queue = FairQueue(max_waiting=config.max_waiting, weights=config.tenant_weights)
        self._started: dict[int, asyncio.Event] = {}  # by number of a ticket that waits

    @contextlib.asynccontextmanager
    async def admit(
        self,
        request: ResolvedRequest,
        time_left: Callable[[], float | None],
        estimate: Callable[[], LatencyEstimate | None],
    ) -> AsyncIterator[None]:
        """Around a request: waits until it may start. `estimate` is called where the request has a deadline.

        Exhausted where too many wait, Expired where its deadline cannot be met, InvalidRequest where it asks for more
        than a request may have.
        """
        self.check_budget(request)
        claim = Claim(
            priority=request.priority,
            tenant=request.tenant,
            tokens=request.tokens,
            weight=request.limits.weight,
        )
        left = time_left()
        ticket = self._queue.enqueue(claim, self._capacity(), left, estimate() if left is not None else None)
        try:
            await self._wait(ticket, time_left)
            yield
        finally:
            self._queue.remove(ticket, time.monotonic())
            self._start()

    async def _wait(self, ticket: Ticket, time_left: Callable[[], float | None]) -> None:
        started = self._started[ticket.number] = asyncio.Event()
        try:
            self._start()
            while not started.is_set():
                left = time_left()
                if left is not None and left <= 0:
                    raise Expired("the deadline passed while the request waited for its turn")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_S if left is None else min(RECHECK_S, left)):
                        await started.wait()
                self._start()
        finally:
            self._started.pop(ticket.number, None)

    def _start(self) -> None:
        for ticket in self._queue.start(self._capacity()):
            started = self._started.get(ticket.number)
            if started is not None:
                started.set()

    def _capacity(self) -> int:
        """Tokens that may run at once: what the decode workers have room for, and some that wait there.

        Gateways that have the same workers share what is beyond: each alone can fill them.
        """
        overcommit = min(self._config.overcommit, max(1.0, self._config.overcommit / self._workers.gateways))
        return round(overcommit * sum(load.capacity_tokens for load in self._workers.routing.decode))

    def check_budget(self, request: ResolvedRequest) -> None:
        """InvalidRequest where a request, for one answer or for several, asks for more than it may have."""
        config, own, tokens = self._config, request.limits, request.tokens
        most_tokens = smaller(config.max_request_tokens, own.max_request_tokens)
        if most_tokens is not None and tokens > most_tokens:
            raise InvalidRequest(f"prompt and output come to {tokens} tokens; allowed: {most_tokens}")
        kv_mib = tokens * self._workers.routing.wire_bytes(request.codec) / (1 << 20)
        most_mib = smaller(config.max_request_kv_mib, own.max_request_kv_mib)
        if most_mib is not None and kv_mib > most_mib:
            raise InvalidRequest(f"prompt and output come to about {kv_mib:.0f} MiB of KV; allowed: {most_mib:g}")
