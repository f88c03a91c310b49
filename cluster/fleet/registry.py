"""The gateway's view of all workers: one `Worker.Watch` stream each, reconnected as long as it is wanted."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import grpc.aio

from ...proto.backoff import backoff_s
from ...proto.errors import Unavailable
from ...proto.rpc.transport import Transport
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import (
    WORKER_HEALTH_CHECKING,
    WORKER_HEALTH_INCOMPATIBLE,
    WORKER_HEALTH_UNFIT,
    WORKER_HEALTH_UNREACHABLE,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    WatchRequest,
    WorkerReport,
)
from ...proto.worker_pb2_grpc import WorkerStub
from ..router.board import Board
from ..router.costs import Demand
from ..router.router import Placement
from ..router.table import Pool
from .compat import Expected, incompatible
from .moving import Moving
from .outliers import Outliers
from .watched import OUT_S, SUSPECT_S, Watched

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 1.0
SOON = 10  # tries at the first distance: a worker that changes its role is back in half a second
LOOK_S = 0.25  # between two looks for workers that are silent


class Fleet:
    """All workers by address: adds, removes, watches them and keeps the board that the router reads.

    Belongs to one event loop. `close` ends the streams and closes the channels, which it owns.
    """

    def __init__(
        self,
        expected: Expected,
        transport: Transport,
        *,
        verify: bool = False,
        failures: "Counter[str] | None" = None,
    ) -> None:
        """With `verify` no worker is used before `judge` has found it fit. `failures`: see `Tasks`."""
        self.tasks = Tasks(failures)
        self._expected = expected
        self._transport = transport
        self._verify = verify
        self._workers: dict[str, Watched] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._reasons: dict[str, str] = {}  # why workers may not be used, by address
        self._known_as: dict[str, str] = {}  # addresses by those that other workers dial
        self._board = Board()
        self._outliers = {WORKER_ROLE_PREFILL: Outliers(), WORKER_ROLE_DECODE: Outliers()}
        self._changed = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self.moving = Moving()
        self.notes: dict[str, Callable[[], str]] = {}  # what whoever starts workers has to say of one that is away
        self.served_s: float | None = None  # when there were workers of both roles last, at a change; None: never

    def add(self, address: str) -> None:
        """Starts to watch a worker; nothing happens where it is watched already."""
        if self._looking is None:
            self._looking = self.tasks.start("look for silent workers", self._look)
        if address not in self._workers:
            self._workers[address] = Watched(address, time.monotonic())
            self._channels[address] = self._transport.dial(address)
            self._streams[address] = self._start_stream(address)

    def _start_stream(self, address: str) -> asyncio.Task[None]:
        return self.tasks.start("watch a worker", partial(self._watch, address), about=address, vital=False)

    async def remove(self, address: str) -> None:
        """Forgets a worker: at once, so that one that is added at the same address meanwhile is another one."""
        if self._workers.pop(address, None) is None:
            return
        self.notes.pop(address, None)
        stream, channel = self._streams.pop(address), self._channels.pop(address)
        for outliers in self._outliers.values():
            outliers.remove(address)
        self._refresh()
        try:
            await self.tasks.end(stream)
        finally:
            await channel.close()

    async def close(self) -> None:
        """Forgets all workers."""
        for address in list(self._workers):
            await self.remove(address)
        await self.tasks.stop()

    def channel(self, address: str) -> grpc.aio.Channel:
        """The open channel to a worker; KeyError where it is gone."""
        return self._channels[address]

    def peer_addresses(self, addresses: Sequence[str]) -> list[str]:
        """Where other workers dial these."""
        workers = [(address, self._workers.get(address)) for address in addresses]
        return [address if worker is None else worker.peer_address for address, worker in workers]

    def known_as(self, peer_address: str) -> str:
        """The address here of a worker that others dial at `peer_address`."""
        return self._known_as.get(peer_address, peer_address)

    def incarnation(self, address: str) -> int:
        """A number that changes when a worker was away and is back; 0 where it is gone or was never reached."""
        worker = self._workers.get(address)
        return worker.incarnation if worker is not None else 0

    @contextlib.contextmanager
    def calling(self, address: str, give_up: Callable[[], None]) -> Iterator[None]:
        """Around a call of a worker: `give_up` is called when the worker is out (no sign of life for OUT_S)."""
        worker = self._workers.get(address)
        if worker is None:
            raise Unavailable(f"worker {address} left")
        worker.calls.add(give_up)
        try:
            yield
        finally:
            worker.calls.discard(give_up)

    def statuses(self) -> list[WorkerReport]:
        """The last report of each worker, its health as the gateway sees it, sorted by role and id."""
        statuses = []
        for worker in self._workers.values():
            status = WorkerReport()
            status.CopyFrom(worker.report or WorkerReport(worker_id=worker.address))
            status.address = worker.address
            if worker.problem:
                note = self.notes.get(worker.address)
                reason = f"{note()} ({worker.problem})" if note is not None else worker.problem
                status.health, status.reason = WORKER_HEALTH_UNREACHABLE, reason
            elif worker.address in self._reasons:
                status.health, status.reason = WORKER_HEALTH_INCOMPATIBLE, self._reasons[worker.address]
            elif worker.ready and not self._is_fit(worker):
                unfit = worker.unfit[1] if worker.unfit is not None and worker.unfit[0] == status.instance else ""
                status.health = WORKER_HEALTH_UNFIT if unfit else WORKER_HEALTH_CHECKING
                status.reason = unfit or "its canary request is not done yet"
            elif worker.ready and self._is_suspect(worker, time.monotonic()):
                status.reason = "gets no new work: it failed, lags behind or reports late"
            statuses.append(status)
        return sorted(statuses, key=lambda status: (status.role, status.worker_id))

    def snapshot(self) -> Board:
        """The workers that take new work, as they are known now; the same board at every call."""
        return self._board

    def to_verify(self) -> tuple[list[WorkerReport], list[WorkerReport]]:
        """Ready workers that could be paired: those not verified yet, and those that are. Addresses are as watched."""
        fresh, verified = list[WorkerReport](), list[WorkerReport]()
        for worker in self._workers.values():
            if worker.ready and worker.report is not None and worker.address not in self._reasons:
                report = WorkerReport()
                report.CopyFrom(worker.report)
                report.address = worker.address
                (verified if self._is_fit(worker) else fresh).append(report)
        return fresh, verified

    def is_flipped(self, report: WorkerReport) -> bool:
        """Whether the worker's process has passed a preflight in another role."""
        worker = self._workers.get(report.address)
        return worker is not None and worker.is_flipped

    def judge(self, report: WorkerReport, unfit: str | None) -> None:
        """The outcome of a preflight, for the instance in `report`: None where it passed, else why not.

        An instance that has passed once stays verified.
        """
        worker = self._workers.get(report.address)
        if worker is None or worker.verified == report.instance:
            return
        if unfit is None:
            worker.verified, worker.unfit = report.instance, None
        else:
            worker.unfit = (report.instance, unfit)
        self._refresh()

    def _is_fit(self, worker: Watched) -> bool:
        return not self._verify or worker.is_verified

    def placed(self, demand: Demand, placement: Placement) -> None:
        """Counts a placement until reports show it."""
        now, pages = time.monotonic(), -(-demand.tokens // placement.page_tokens)
        missing = demand.prompt_tokens - round(placement.cached_tokens)
        for pool, address, tokens, used in (
            (self._board.decode, placement.decode, 0, pages),
            *((self._board.prefill, first, missing, 0) for first in placement.prefill[:1]),
        ):
            worker, row = self._workers.get(address), pool.row.get(address)
            if worker is None or row is None:
                continue
            pool.count(row, tokens=tokens, pages=used, steps=demand.steps)
            worker.placed(now, tokens, used)
            outliers = self._outliers_of(worker)
            if outliers is not None:
                outliers.placed(address, now)
                if outliers.ejected(address, now):
                    self._show(worker)

    def failed(self, address: str) -> None:
        """A request failed on a worker, for a reason that may be the worker's."""
        self._tell(address, lambda outliers, now: outliers.failed(address, now))

    def served(self, address: str, *, took_ms: float = 0.0, expected_ms: float = 0.0) -> None:
        """A worker did what it was asked to."""
        self._tell(
            address, lambda outliers, now: outliers.served(address, now, took_ms=took_ms, expected_ms=expected_ms)
        )

    def default_codec(self) -> str:
        """The default of the decode workers (the same for all unless settings are mixed); "" with none."""
        defaults = [
            worker.report.default_codec
            for worker in self._workers.values()
            if worker.report is not None and worker.report.role == WORKER_ROLE_DECODE and not worker.problem
        ]
        return min(defaults, default="")

    @property
    def change(self) -> asyncio.Event:
        """Is set at the next change of a worker's health or of the set of workers; a new one replaces it."""
        return self._changed

    def _tell(self, address: str, tell: Callable[[Outliers, float], None]) -> None:
        worker = self._workers.get(address)
        outliers = self._outliers_of(worker) if worker is not None else None
        if worker is None or outliers is None:
            return
        now = time.monotonic()
        before = outliers.ejected(address, now)
        tell(outliers, now)
        if outliers.ejected(address, now) != before:
            log.warning("a worker is %s", "taken back" if before else "ejected", extra={"fields": {"worker": address}})
        self._show(worker)

    def _outliers_of(self, worker: Watched) -> Outliers | None:
        return self._outliers.get(worker.report.role) if worker.report is not None else None

    def _pool_of(self, worker: Watched) -> Pool | None:
        """Where a worker belongs on the board; None where it must not be used."""
        if not worker.ready or worker.report is None or worker.address in self._reasons or not self._is_fit(worker):
            return None
        return self._board.prefill if worker.report.role == WORKER_ROLE_PREFILL else self._board.decode

    def _is_suspect(self, worker: Watched, now: float) -> bool:
        outliers = self._outliers_of(worker)
        return now - worker.heard_s > SUSPECT_S or (outliers is not None and outliers.ejected(worker.address, now))

    def _show(self, worker: Watched) -> None:
        """Brings one worker's row up to date."""
        pool = self._pool_of(worker)
        if pool is not None:
            suspect = self._is_suspect(worker, time.monotonic())
            pool.put(worker.load(suspect=suspect, known_as=self._known_as))

    def _refresh(self) -> None:
        """The set of workers, or what one may be used for, has changed."""
        served = len(self._board.prefill) and len(self._board.decode)
        reachable = {
            worker.address: worker.report
            for worker in self._workers.values()
            if worker.report is not None and not worker.problem
        }
        self._reasons = incompatible(reachable, self._expected)
        self._known_as = {worker.peer_address: worker.address for worker in self._workers.values()}
        for pool in (self._board.prefill, self._board.decode):
            for address in list(pool.row):
                worker = self._workers.get(address)
                if worker is None or self._pool_of(worker) is not pool:
                    pool.remove(address)
        for worker in self._workers.values():
            self._show(worker)
        if served or (len(self._board.prefill) and len(self._board.decode)):
            self.served_s = time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _look(self) -> None:
        """Finds workers that have fallen silent."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            stalled, last = now - last - LOOK_S, now
            for worker in list(self._workers.values()):
                if stalled > LOOK_S:
                    worker.heard_s += stalled  # it was this process that did not listen
                silent = now - worker.heard_s
                pool = self._pool_of(worker)
                if silent > OUT_S:
                    self._give_up(worker)
                elif pool is not None and pool.loads[worker.address].suspect != self._is_suspect(worker, now):
                    self._show(worker)

    def _give_up(self, worker: Watched) -> None:
        """A worker is out: what runs there is placed anew, and its stream is opened anew."""
        for give_up in tuple(worker.calls):
            give_up()
        if not worker.problem:
            self._lost(worker, f"no report for {OUT_S:g} s")
            self._streams[worker.address].cancel()
            self._streams[worker.address] = self._start_stream(worker.address)

    def _lost(self, worker: Watched, problem: str) -> None:
        was_up = not worker.problem
        worker.problem = problem
        if was_up:
            log.warning("lost a worker", extra={"fields": {"worker": worker.address, "problem": problem}})
            self._refresh()

    async def _watch(self, address: str) -> None:
        worker, tries = self._workers[address], 0
        while True:
            reports = worker.incarnation
            try:
                await self._follow(worker)
                problem = "ended its report stream"
            except grpc.aio.AioRpcError as error:
                problem = _one_line(error)
            except Exception as error:  # a bug here: the worker is not used until its reports can be
                self._lost(worker, f"its reports cannot be used ({type(error).__name__}); see the gateway's log")
                raise
            tries = tries + 1 if worker.incarnation == reports else 1
            self._lost(worker, problem)
            await asyncio.sleep(backoff_s(max(1, tries - SOON + 1), FIRST_RETRY_S, LAST_RETRY_S))

    async def _follow(self, worker: Watched) -> None:
        call = WorkerStub(self._channels[worker.address]).Watch(WatchRequest())
        try:
            while isinstance(report := await call.read(), WorkerReport):
                incarnation = worker.incarnation
                changed = worker.take(report, time.monotonic())
                if worker.incarnation != incarnation:
                    self._begin(worker)
                if changed:
                    self._refresh()
                elif worker.news:  # an idle worker says the same again and again
                    self._show(worker)
        finally:
            call.cancel()

    def _begin(self, worker: Watched) -> None:
        """A worker is new, or was started anew, or can be reached again."""
        outliers = self._outliers_of(worker)
        if outliers is not None:
            outliers.add(worker.address)


def _one_line(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return "cannot be reached (no process there, or no way to it)"
    details = (error.details() or "").splitlines() or [""]
    return f"{error.code().name}: {details[0]}"
