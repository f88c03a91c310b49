"""The gateway's door: requests wait here until admission lets them in."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from ...proto.errors import Expired, InvalidRequest
from ..fleet.registry import Fleet
from ..gateway_config import GatewayConfig
from ..router.estimates import Expected
from .fair_queue import Admission, Ticket, Wanted
from .request import Admitted

LOOK_AGAIN_S = 1.0  # capacity changes with the workers, too


class Door:
    """Lets requests in; belongs to one event loop."""

    def __init__(self, fleet: Fleet, config: GatewayConfig) -> None:
        self._fleet, self._config = fleet, config
        self._admission = Admission(max_waiting=config.max_waiting, weights=config.tenant_weights)
        self._turns: dict[int, asyncio.Event] = {}  # by number of a ticket that waits

    @contextlib.asynccontextmanager
    async def inside(
        self, request: Admitted, time_left: Callable[[], float | None], expect: Callable[[], Expected | None]
    ) -> AsyncIterator[None]:
        """Around a request: waits for its turn. `expect` is asked where the request has a deadline.

        Exhausted where too many wait, Expired where its deadline cannot be met, InvalidRequest where it asks for more
        than a request may have.
        """
        self._check_budget(request)
        wanted = Wanted(
            priority=request.priority,
            tenant=request.tenant,
            tokens=len(request.prompt_token_ids) + request.sampling.max_tokens,
        )
        left = time_left()
        ticket = self._admission.ask(wanted, self._capacity(), left, expect() if left is not None else None)
        try:
            await self._wait(ticket, time_left)
            yield
        finally:
            self._admission.leave(ticket, time.monotonic())
            self._let_in()

    async def _wait(self, ticket: Ticket, time_left: Callable[[], float | None]) -> None:
        turn = self._turns[ticket.number] = asyncio.Event()
        try:
            self._let_in()
            while not turn.is_set():
                left = time_left()
                if left is not None and left <= 0:
                    raise Expired("the deadline passed while the request waited for its turn")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S if left is None else min(LOOK_AGAIN_S, left)):
                        await turn.wait()
                self._let_in()
        finally:
            self._turns.pop(ticket.number, None)

    def _let_in(self) -> None:
        for ticket in self._admission.start(self._capacity()):
            turn = self._turns.get(ticket.number)
            if turn is not None:
                turn.set()

    def _capacity(self) -> int:
        """Tokens that may run at once: what the decode workers hold, and some that wait there."""
        board = self._fleet.snapshot()
        return round(self._config.overcommit * sum(load.capacity_tokens for load in board.decode))

    def _check_budget(self, request: Admitted) -> None:
        config, tokens = self._config, len(request.prompt_token_ids) + request.sampling.max_tokens
        if config.max_request_tokens is not None and tokens > config.max_request_tokens:
            raise InvalidRequest(f"prompt and output come to {tokens} tokens; allowed: {config.max_request_tokens}")
        kv_mib = tokens * self._fleet.snapshot().wire_bytes(request.codec) / (1 << 20)
        if config.max_request_kv_mib is not None and kv_mib > config.max_request_kv_mib:
            raise InvalidRequest(
                f"prompt and output come to about {kv_mib:.0f} MiB of KV; allowed: {config.max_request_kv_mib:g}"
            )
