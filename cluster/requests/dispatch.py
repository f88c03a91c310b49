"""One admitted request on the decode workers: placed, called, and placed again where its worker is lost.

A replay sends the same request with the tokens that the client has already. The next decode worker gets the prompt's
KV by an ordinary transfer, runs those tokens through the model and goes on after them; sampling is counter-based, so it
draws what the lost one would have drawn.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...kvtransfer.frame import PROTOCOL_VERSION
from ...proto.common_pb2 import Candidate
from ...proto.decode_pb2 import DecodeRequest
from ...proto.errors import (
    Blamed,
    Corrupt,
    EngineFailed,
    Exhausted,
    Expired,
    Incompatible,
    InvalidRequest,
    IsthmusError,
    Unavailable,
)
from ...proto.rpc.trace import TraceContext
from ..fleet.registry import Fleet
from ..fleet.shortage import Shortage
from ..gateway_config import GatewayConfig
from ..router.costs import Demand
from ..router.estimates import LatencyEstimate, estimate_latency
from ..router.explain import explain
from ..router.router import Placement, route
from .attempt import Attempts, PassOn
from .prepare import Preparation, PreparedRequest
from .request import ResolvedRequest
from .retry import Failures
from .session import Session
from .suspicion import Suspicion

log = logging.getLogger(__name__)

LOST = (Unavailable, Exhausted, Corrupt, Incompatible)  # another decode worker may do better
RETRY_S = 0.25  # while nothing can be placed and no worker's health changes

TimeLeft = Callable[[], float | None]  # seconds to the request's deadline, None without one


@dataclass(frozen=True)
class Near:
    """Where the prompt of a request is already."""

    decode: str  # address of the worker that holds its pages
    request_id: str  # by which that knows the request that brought them
    by_transfer: bool  # from a prefill worker, which has them too: as computed, where the decode worker's are packed


class Dispatcher:
    """Runs requests on the workers of a fleet."""

    def __init__(self, fleet: Fleet, fingerprint: str, config: GatewayConfig, shortage: Shortage | None = None) -> None:
        """`shortage` is told of requests that wait for a place."""
        self._shortage = shortage
        self._fleet = fleet
        self._fingerprint = fingerprint
        self._config = config
        self._preparation = Preparation(fleet.table, fingerprint)
        self._attempts = Attempts(fleet)

    def prepare(self, request: ResolvedRequest) -> PreparedRequest:
        """See `Preparation.prepare`."""
        return self._preparation.prepare(request)

    def estimate(self, request: ResolvedRequest, prepared: PreparedRequest) -> LatencyEstimate | None:
        """How long a request will take now, as far as that is known."""
        sampling = request.sampling
        endless = sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids
        return estimate_latency(
            prepared.demand,
            self._fleet.table.routing,
            min_output_tokens=sampling.max_tokens if endless else sampling.min_tokens,
            local_prefill=self._config.local_prefill,
        )

    async def run(
        self,
        session: Session,
        prepared: PreparedRequest,
        pass_on: PassOn,
        *,
        time_left: TimeLeft,
        trace: TraceContext = (),
        suspicion: Suspicion | None = None,
        near: Near | None = None,
    ) -> None:
        """Brings a session to its end; `pass_on` gets every event for the client, and no token twice.

        `prepared` is its request, as of when it came, and `suspicion` what is known of it from earlier runs. `near`:
        where its prompt is, which is preferred to all other places as long as there is room.

        A decode worker that is lost, full or of no use costs nothing but time: the request goes on on another one,
        or on the same one once that is back. One that engines die of ends with Blamed (`suspicion.py`). Raises the
        IsthmusError that ended the request; the inner call is cancelled in every case.
        """
        try:
            await self._run(session, prepared, pass_on, time_left, trace, suspicion or Suspicion(), near)
        finally:
            self._fleet.replays.end(session.request.call_id)

    async def _run(
        self,
        session: Session,
        prepared: PreparedRequest,
        pass_on: PassOn,
        time_left: TimeLeft,
        trace: TraceContext,
        suspicion: Suspicion,
        near: Near | None,
    ) -> None:
        failures = Failures(limit=self._config.replays, wait_s=self._config.restart_wait_s)
        pages, demand = prepared.pages, prepared.demand
        while True:
            if (end := session.missing_end()) is not None:
                return await pass_on(session.push(end, time.monotonic()))
            placement = await self._place(demand, failures, time_left, near, started=bool(session.token_ids))
            if session.request.explain and not failures.count:
                session.candidates = self._candidates(demand, placement)
            if (layout := (placement.page_tokens, placement.codec_hash)) != pages.layout:
                pages = self._preparation.hash_pages(session.request, layout)
            message = self._message(session, placement, pages.hashes, failures.count)
            message.alone = suspicion.alone
            session.decode_request_id = message.request_id
            message.fork_of = "" if near is None else near.request_id
            try:
                await self._attempts.run(session, placement, message, pass_on, time_left(), trace)
                self._fleet.table.routing.record_answer(len(session.token_ids))
                return
            except LOST as error:
                self._record_failure(session, placement.decode, error, failures)
                self._suspect(session, error, suspicion)

    def explain(self, request: ResolvedRequest) -> tuple[Candidate, ...]:
        """What a request would cost on which workers; raises what `route` raises."""
        demand = self.prepare(request).demand
        config, table = self._config, self._fleet.table.routing
        placement = route(demand, table, policy=config.policy, local_prefill=config.local_prefill)
        return self._candidates(demand, placement)

    def _candidates(self, demand: Demand, placement: Placement) -> tuple[Candidate, ...]:
        prices = explain(demand, self._fleet.table.routing, placement, local_prefill=self._config.local_prefill)
        return tuple(Candidate(**price._asdict()) for price in prices)

    async def _place(
        self, demand: Demand, failures: Failures, time_left: TimeLeft, near: Near | None, *, started: bool
    ) -> Placement:
        """A place for the request, as soon as there is one; raises what failed last where there is none in time."""
        config, table = self._config, self._fleet.table
        unplaced = Unavailable("the request was placed too often")
        while True:
            now, change = time.monotonic(), self._fleet.change
            for avoid in failures.avoid(now, table.incarnation):
                try:
                    placement = self._near(demand, near, avoid) or route(
                        *(demand, table.routing), avoid=avoid, policy=config.policy, local_prefill=config.local_prefill
                    )
                except Unavailable as error:
                    unplaced = error
                    continue
                self._fleet.place(demand, placement)
                return placement
            left = failures.wait_left(now, started=started)
            if left <= 0:
                raise failures.last or unplaced
            deadline = time_left()
            if deadline is not None and deadline <= 0:
                raise Expired("the deadline passed while the request waited for a decode worker")
            waiting = self._shortage.waiting() if self._shortage is not None else contextlib.nullcontext()
            with waiting, contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(RETRY_S, left)):  # wait_for can swallow a cancellation
                    await change.wait()

    def _near(self, demand: Demand, near: Near | None, avoid: set[str]) -> Placement | None:
        """A place where the prompt is already, if there is room and nothing failed there."""
        config, table = self._config, self._fleet.table.routing
        row = None if near is None or near.decode in avoid else table.decode.row_of.get(near.decode)
        if near is None or row is None or table.decode.room.item(row) < demand.max_tokens:
            return None
        others = table.decode.row_of.keys() - {near.decode}
        local = "never" if near.by_transfer else config.local_prefill
        with contextlib.suppress(Unavailable, InvalidRequest):
            return route(demand, table, avoid=avoid | others, policy=config.policy, local_prefill=local)
        return None

    def _record_failure(self, session: Session, worker: str, error: IsthmusError, failures: Failures) -> None:
        table = self._fleet.table
        if isinstance(error, EngineFailed) and error.at:
            worker = table.address_of_peer(error.at)  # the prefill worker's engine failed, and not the caller's
        failures.add(worker, error, time.monotonic(), table.incarnation(worker))
        if not isinstance(error, Exhausted):
            self._fleet.failed(worker)
            if session.token_ids:
                self._fleet.replays.begin(session.request.call_id)
        fields = {
            "request_id": session.request.request_id,
            "failed": worker,
            "why": str(error),
            "output_tokens": len(session.token_ids),
        }
        log.info("placing a request again", extra={"fields": fields})

    def _suspect(self, session: Session, error: IsthmusError, suspicion: Suspicion) -> None:
        request_id = session.request.request_id
        before = suspicion.alone
        try:
            suspicion.failed(request_id, error, len(session.token_ids))
        except Blamed as blamed:
            log.error("a request is blamed", extra={"fields": {"request_id": request_id, "why": str(blamed)}})
            raise
        if suspicion.alone and not before:
            log.warning("a request is tried alone", extra={"fields": {"request_id": request_id, "why": str(error)}})

    def _message(self, session: Session, placement: Placement, hashes: bytes, attempt: int) -> DecodeRequest:
        request, sampling = session.request, session.request.sampling
        if session.token_ids:  # the log-probabilities of the prompt came before them
            sampling = replace(sampling, prompt_logprobs=None)
        return DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"{request.call_id}.{attempt}" if attempt else request.call_id,
            model_fingerprint=self._fingerprint,
            codec=request.codec,
            prompt_token_ids=request.prompt_token_ids,
            page_hashes=hashes,
            sampling=sampling.to_pb(),
            prefill_addresses=self._fleet.table.peer_addresses(placement.prefill),
            emitted_token_ids=session.token_ids,
            allow_local_prefill=self._config.local_prefill != "never",
            priority=request.priority,
            tenant=request.tenant,
            prefix_scope=request.prefix_scope,
            forks=request.sampling.n - 1 if request.choice == 0 else 0,
        )
