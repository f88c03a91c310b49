"""One admitted request on the decode workers: placed, called, and placed again where its worker is lost.

A replay sends the same request with the tokens that the client has already. The next decode worker gets the prompt's
KV by an ordinary transfer, runs those tokens through the model and goes on after them; sampling is counter-based, so it
draws what the lost one would have drawn.
"""

import asyncio
import logging
import time
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count

import grpc.aio

from ...kvtransfer.frame import PROTOCOL_VERSION
from ...kvtransfer.hashing import page_hashes, page_salt
from ...proto.common_pb2 import Candidate, TransferStats
from ...proto.decode_pb2 import DecodeEvent, DecodeRequest
from ...proto.decode_pb2_grpc import DecodeStub
from ...proto.errors import (
    Blamed,
    Corrupt,
    EngineFailed,
    Exhausted,
    Expired,
    Incompatible,
    IsthmusError,
    Lost,
    Unavailable,
)
from ...proto.generation_pb2 import GenerateEvent
from ...proto.rpc.statuses import PeerBug, error_of
from ...proto.rpc.trace import TraceContext
from ..fleet.registry import Fleet
from ..gateway_config import GatewayConfig
from ..router.costs import Demand
from ..router.expected import Expected, expected
from ..router.explain import explain
from ..router.prefixes import steps_of
from ..router.router import Placement, route
from .request import Admitted
from .retry import Failures
from .session import Session
from .suspicion import Suspicion

log = logging.getLogger(__name__)

LOST = (Unavailable, Exhausted, Corrupt, Incompatible)  # another decode worker may do better
AFFINITY_TOKENS = 64  # prompts that share so many first tokens go to the same workers when loads are equal
LOOK_AGAIN_S = 0.25  # while nothing can be placed and no worker's health changes

PassOn = Callable[[GenerateEvent], Awaitable[None]]
TimeLeft = Callable[[], float | None]  # seconds to the request's deadline, None without one


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """A request's page hashes, for workers of one kind."""

    page_tokens: int
    codec_hash: str
    hashes: bytes


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request as it is placed: its pages hashed once, and what the router needs to know of it."""

    hashed: Hashed
    demand: Demand


class Dispatcher:
    """Runs requests on the workers of a fleet."""

    def __init__(self, fleet: Fleet, fingerprint: str, config: GatewayConfig) -> None:
        self._fleet = fleet
        self._fingerprint = fingerprint
        self._config = config
        self._numbers = count()

    def prepare(self, request: Admitted) -> Prepared:
        """Hashes a request's pages as most workers that could serve it want them."""
        hashed = self.hash_pages(request)
        return Prepared(hashed=hashed, demand=self.demand_of(request, hashed))

    def expect(self, request: Admitted, prepared: Prepared) -> Expected | None:
        """What a request has to expect now, as far as that is known."""
        sampling = request.sampling
        endless = sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids
        insists = sampling.max_tokens if endless else sampling.min_tokens
        return expected(
            prepared.demand, self._fleet.snapshot(), insists=insists, local_prefill=self._config.local_prefill
        )

    async def run(
        self,
        session: Session,
        prepared: Prepared,
        pass_on: PassOn,
        *,
        time_left: TimeLeft,
        trace: TraceContext = (),
        suspicion: Suspicion | None = None,
    ) -> None:
        """Brings a session to its end; `pass_on` gets every event for the client, and no token twice.

        `prepared` is its request, as of when it came, and `suspicion` what is known of it from earlier runs.

        A decode worker that is lost, full or of no use costs nothing but time: the request goes on on another one,
        or on the same one once that is back. One that engines die of ends with Blamed (`suspicion.py`). Raises the
        IsthmusError that ended the request; the inner call is cancelled in every case.
        """
        try:
            await self._run(session, prepared, pass_on, time_left, trace, suspicion or Suspicion())
        finally:
            self._fleet.moving.end(session.request.call_id)

    async def _run(
        self,
        session: Session,
        prepared: Prepared,
        pass_on: PassOn,
        time_left: TimeLeft,
        trace: TraceContext,
        suspicion: Suspicion,
    ) -> None:
        failures = Failures(limit=self._config.replays, wait_s=self._config.restart_wait_s)
        hashed, demand = prepared.hashed, prepared.demand
        while True:
            if (end := session.missing_end()) is not None:
                return await pass_on(session.push(end, time.monotonic()))
            placement = await self._place(demand, failures, time_left, started=bool(session.token_ids))
            if session.request.explain and not failures.count:
                session.candidates = self._candidates(demand, placement)
            if (placement.page_tokens, placement.codec_hash) != (hashed.page_tokens, hashed.codec_hash):
                hashed = self._hash(session.request, placement.page_tokens, placement.codec_hash)
            message = self._message(session, placement, hashed.hashes, failures.count)
            message.alone = suspicion.alone
            try:
                await self._call(session, placement, message, pass_on, time_left(), trace)
                self._fleet.snapshot().saw_answer(len(session.token_ids))
                return
            except LOST as error:
                self._note_failure(session, placement.decode, error, failures)
                self._suspect(session, error, suspicion)

    def explain(self, request: Admitted) -> tuple[Candidate, ...]:
        """What a request would cost where; raises what `route` raises."""
        demand = self.prepare(request).demand
        config = self._config
        placement = route(demand, self._fleet.snapshot(), policy=config.policy, local_prefill=config.local_prefill)
        return self._candidates(demand, placement)

    def _candidates(self, demand: Demand, placement: Placement) -> tuple[Candidate, ...]:
        prices = explain(demand, self._fleet.snapshot(), placement, local_prefill=self._config.local_prefill)
        return tuple(Candidate(**price._asdict()) for price in prices)

    def hash_pages(self, request: Admitted) -> Hashed:
        """The hashes of a request's pages, as most workers that could serve it want them."""
        kinds = self._fleet.snapshot().offer(request.codec).kinds
        return self._hash(request, *kinds[0]) if kinds else Hashed(page_tokens=0, codec_hash="", hashes=b"")

    def demand_of(self, request: Admitted, hashed: Hashed) -> Demand:
        """What the router needs to know of a request."""
        beginning = array("I", request.prompt_token_ids[:AFFINITY_TOKENS]).tobytes()
        return Demand(
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens,
            codec=request.codec,
            affinity=int.from_bytes(blake2b(beginning, digest_size=8).digest(), "big"),
            steps=steps_of(hashed.hashes, hashed.page_tokens),
            priority=request.priority,
            number=next(self._numbers),
        )

    def _hash(self, request: Admitted, page_tokens: int, codec_hash: str) -> Hashed:
        salt = page_salt(self._fingerprint, request.codec, codec_hash, request.tenant)
        hashes = page_hashes(request.prompt_token_ids, page_tokens, salt)
        return Hashed(page_tokens=page_tokens, codec_hash=codec_hash, hashes=hashes)

    async def _place(self, demand: Demand, failures: Failures, time_left: TimeLeft, *, started: bool) -> Placement:
        """A place for the request, as soon as there is one; raises what failed last where there is none in time."""
        config, board = self._config, self._fleet.snapshot()
        unplaced = Unavailable("the request was placed too often")
        while True:
            now, change = time.monotonic(), self._fleet.change
            for avoid in failures.avoid(now, self._fleet.incarnation):
                try:
                    placement = route(
                        *(demand, board), avoid=avoid, policy=config.policy, local_prefill=config.local_prefill
                    )
                except Unavailable as error:
                    unplaced = error
                    continue
                self._fleet.placed(demand, placement)
                return placement
            left = failures.wait_left(now, started=started)
            if left <= 0:
                raise failures.last or unplaced
            deadline = time_left()
            if deadline is not None and deadline <= 0:
                raise Expired("the deadline passed while the request waited for a decode worker")
            try:
                async with asyncio.timeout(min(LOOK_AGAIN_S, left)):  # wait_for can swallow a cancellation
                    await change.wait()
            except TimeoutError:
                continue

    def _note_failure(self, session: Session, worker: str, error: IsthmusError, failures: Failures) -> None:
        if isinstance(error, EngineFailed) and error.at:
            worker = self._fleet.known_as(error.at)  # the prefill worker's engine, and not that of the one who says it
        failures.add(worker, error, time.monotonic(), self._fleet.incarnation(worker))
        if not isinstance(error, Exhausted):
            self._fleet.failed(worker)
            if session.token_ids:
                self._fleet.moving.begin(session.request.call_id)
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

    async def _call(
        self,
        session: Session,
        placement: Placement,
        message: DecodeRequest,
        pass_on: PassOn,
        timeout_s: float | None,
        trace: TraceContext,
    ) -> None:
        """One call of one decode worker, to the end of the answer; raises what ended it before."""
        worker, lost = placement.decode, False
        replay = bool(message.emitted_token_ids) and message.request_id != session.request.call_id
        try:
            channel = self._fleet.channel(worker)
        except KeyError:
            raise Unavailable(f"decode worker {worker} left") from None
        call = DecodeStub(channel).Generate(message, timeout=timeout_s, metadata=trace or None)
        session.decode_worker = worker

        def give_up() -> None:
            nonlocal lost
            lost = True
            call.cancel()

        try:
            with self._fleet.calling(worker, give_up):
                while not session.finished:
                    event = await call.read()
                    if not isinstance(event, DecodeEvent):
                        raise Unavailable(f"decode worker {worker} ended the answer early")
                    if replay:
                        self._fleet.moving.end(session.request.call_id)
                        session.replays, replay = session.replays + 1, False
                    made = session.push(event, time.monotonic())
                    if event.HasField("transfer") and (session.finished or not event.transfer.partial):
                        self._learn(session.request, placement, event.transfer)
                    await pass_on(made)
        except grpc.aio.AioRpcError as error:
            raise _translated(error, worker) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not lost or (task is not None and task.cancelling()):
                raise
            raise Lost(f"decode worker {worker} gives no sign of life") from None
        finally:
            call.cancel()

    def _learn(self, request: Admitted, placement: Placement, stats: TransferStats) -> None:
        """What a transfer says of the workers: who served, how fast, and what they had cached."""
        board, prompt = self._fleet.snapshot(), len(request.prompt_token_ids)
        self._fleet.served(placement.decode)
        board.decode.check_belief(placement.decode, placement.held_tokens, stats.held_tokens)
        if (
            stats.local_tokens or not placement.prefill or not stats.attempt
        ):  # no attempt: nothing is known of who served
            return
        for address in placement.prefill[: stats.attempt - 1]:
            self._fleet.failed(address)
        server = placement.prefill[min(stats.attempt, len(placement.prefill)) - 1]
        if stats.partial:  # the answer ended with its first token: bytes, caches and times are known to nobody
            return self._fleet.served(server)
        board.saw_transfer(request.codec, prompt - stats.held_tokens, stats.kv_bytes_wire)
        if stats.attempt == 1:
            found = stats.cached_tokens + stats.stored_tokens
            board.prefill.check_belief(server, placement.cached_tokens, found + stats.held_tokens)
        self._fleet.served(server, took_ms=stats.queue_ms + stats.prefill_ms, expected_ms=placement.prefill_ms)

    def _message(self, session: Session, placement: Placement, hashes: bytes, attempt: int) -> DecodeRequest:
        request = session.request
        return DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"{request.call_id}.{attempt}" if attempt else request.call_id,
            model_fingerprint=self._fingerprint,
            codec=request.codec,
            prompt_token_ids=request.prompt_token_ids,
            page_hashes=hashes,
            sampling=request.sampling.to_pb(),
            prefill_addresses=self._fleet.peer_addresses(placement.prefill),
            emitted_token_ids=session.token_ids,
            allow_local_prefill=self._config.local_prefill != "never",
            priority=request.priority,
            tenant=request.tenant,
        )


def _translated(error: grpc.aio.AioRpcError, worker: str) -> Exception:
    """The error for the client. What the worker refuses the request for is told in its own words."""
    known = error_of(error)
    if isinstance(known, Expired):
        return Expired("the deadline passed before the answer was finished")
    return error_of(error, f"decode worker {worker}") if isinstance(known, Unavailable | PeerBug) else known
