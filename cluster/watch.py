"""The gateway's view of all workers: one `Worker.Watch` stream each, reconnected as long as it is wanted."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc.aio

from ..proto.errors import Unavailable
from ..proto.serving import open_channel
from ..proto.worker_pb2 import (
    WORKER_HEALTH_CHECKING,
    WORKER_HEALTH_INCOMPATIBLE,
    WORKER_HEALTH_READY,
    WORKER_HEALTH_UNFIT,
    WORKER_HEALTH_UNREACHABLE,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    WatchRequest,
    WorkerReport,
)
from ..proto.worker_pb2_grpc import WorkerStub
from .compat import Expected, incompatible
from .router import Demand, Placement, Snapshot, WorkerLoad

log = logging.getLogger(__name__)

SILENCE_S = 5.0  # a worker reports at least every 100 ms; after this long it is taken for dead
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 1.0
REPORT_LAG_S = 0.2  # a report may be older than what was placed this long before it came


@dataclass
class _Watched:
    """One worker's address, connection and last report."""

    address: str
    channel: grpc.aio.Channel
    report: WorkerReport | None = None
    problem: str = "not reached yet"  # empty while reports come
    placed: deque[tuple[float, int]] = field(default_factory=deque)  # when, tokens: not in a report yet
    incarnation: int = 0  # times that it was reached
    calls: set[Callable[[], None]] = field(default_factory=set)  # that give up what runs there
    task: asyncio.Task[None] | None = None
    verified: str | None = None  # the instance that has passed its preflight
    unfit: tuple[str, str] | None = None  # an instance that has failed it, and why

    def take(self, report: WorkerReport, now: float) -> None:
        self.incarnation += bool(self.problem)
        self.report, self.problem = report, ""
        while self.placed and self.placed[0][0] < now - REPORT_LAG_S:
            self.placed.popleft()

    @property
    def placed_tokens(self) -> int:
        return sum(tokens for _, tokens in self.placed)


class Fleet:
    """All workers by address: adds, removes, watches them and tells what may be used.

    Belongs to one event loop. `close` ends the streams and closes the channels, which it owns.
    """

    def __init__(self, expected: Expected, *, verify: bool = False) -> None:
        """With `verify` no worker is used before `judge` has found it fit."""
        self._expected = expected
        self._verify = verify
        self._workers: dict[str, _Watched] = {}
        self._changed = asyncio.Event()

    def add(self, address: str) -> None:
        """Starts to watch a worker; nothing happens where it is watched already."""
        if address not in self._workers:
            worker = _Watched(address=address, channel=open_channel(address))
            self._workers[address] = worker
            worker.task = asyncio.create_task(self._watch(worker), name=f"watch {address}")

    async def remove(self, address: str) -> None:
        """Forgets a worker."""
        worker = self._workers.pop(address, None)
        if worker is None:
            return
        if worker.task is not None:
            worker.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker.task
        await worker.channel.close()
        self._notify()

    async def close(self) -> None:
        """Forgets all workers."""
        for address in list(self._workers):
            await self.remove(address)

    def channel(self, address: str) -> grpc.aio.Channel:
        """The open channel to a worker; KeyError where it is gone."""
        return self._workers[address].channel

    def incarnation(self, address: str) -> int:
        """A number that changes when a worker was away and is back; 0 where it is gone or was never reached."""
        worker = self._workers.get(address)
        return worker.incarnation if worker is not None else 0

    @contextlib.contextmanager
    def calling(self, address: str, give_up: Callable[[], None]) -> Iterator[None]:
        """Around a call of a worker: `give_up` is called when the worker gives no sign of life for SILENCE_S."""
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
        reasons = self._incompatible()
        statuses = []
        for worker in self._workers.values():
            status = WorkerReport()
            status.CopyFrom(worker.report or WorkerReport(worker_id=worker.address))
            status.address = worker.address
            if worker.problem:
                status.health, status.reason = WORKER_HEALTH_UNREACHABLE, worker.problem
            elif worker.address in reasons:
                status.health, status.reason = WORKER_HEALTH_INCOMPATIBLE, reasons[worker.address]
            elif status.health == WORKER_HEALTH_READY and not self._is_verified(worker, status):
                unfit = worker.unfit is not None and worker.unfit[0] == status.instance
                status.health = WORKER_HEALTH_UNFIT if unfit else WORKER_HEALTH_CHECKING
                status.reason = worker.unfit[1] if unfit and worker.unfit else "its canary request is not done yet"
            statuses.append(status)
        return sorted(statuses, key=lambda status: (status.role, status.worker_id))

    def snapshot(self) -> Snapshot:
        """The workers that take new work, with what was placed on them since their last report."""
        reasons = self._incompatible()
        loads: dict[int, list[WorkerLoad]] = {WORKER_ROLE_PREFILL: [], WORKER_ROLE_DECODE: []}
        for worker in self._workers.values():
            report = worker.report
            ready = report is not None and not worker.problem and report.health == WORKER_HEALTH_READY
            if report is not None and ready and worker.address not in reasons and self._is_verified(worker, report):
                loads[report.role].append(_load(worker, report))
        return Snapshot(
            prefill=tuple(loads[WORKER_ROLE_PREFILL]),
            decode=tuple(loads[WORKER_ROLE_DECODE]),
        )

    def to_verify(self) -> tuple[list[WorkerReport], list[WorkerReport]]:
        """Ready workers that could be paired: those not verified yet, and those that are. Addresses are as watched."""
        reasons, fresh, verified = self._incompatible(), list[WorkerReport](), list[WorkerReport]()
        for worker in self._workers.values():
            if worker.report is None or worker.problem or worker.address in reasons:
                continue
            if worker.report.health == WORKER_HEALTH_READY:
                report = WorkerReport()
                report.CopyFrom(worker.report)
                report.address = worker.address
                (verified if self._is_verified(worker, report) else fresh).append(report)
        return fresh, verified

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
        self._notify()

    def _is_verified(self, worker: _Watched, report: WorkerReport) -> bool:
        return not self._verify or worker.verified == report.instance

    def placed(self, demand: Demand, placement: Placement) -> None:
        """Counts a placement until reports show it."""
        now = time.monotonic()
        for address, tokens in (
            (placement.decode, demand.prompt_tokens + demand.max_tokens),
            (placement.prefill[0], demand.prompt_tokens),
        ):
            if address in self._workers:
                self._workers[address].placed.append((now, tokens))

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

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _incompatible(self) -> dict[str, str]:
        reachable = {
            worker.address: worker.report
            for worker in self._workers.values()
            if worker.report is not None and not worker.problem
        }
        return incompatible(reachable, self._expected)

    async def _watch(self, worker: _Watched) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            was_up = not worker.problem
            try:
                await self._follow(worker)
                problem = "ended its report stream"
            except TimeoutError:
                problem = f"no report for {SILENCE_S:g} s"
                for give_up in tuple(worker.calls):
                    give_up()
            except grpc.aio.AioRpcError as error:
                problem = _one_line(error)
            if not worker.problem:  # it had reported
                retry_s = FIRST_RETRY_S
            worker.problem = problem
            if was_up:
                log.warning("lost a worker", extra={"fields": {"worker": worker.address, "problem": problem}})
            self._notify()
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _follow(self, worker: _Watched) -> None:
        call = WorkerStub(worker.channel).Watch(WatchRequest())
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):  # wait_for can swallow a cancellation
                    report = await call.read()
                if not isinstance(report, WorkerReport):
                    return
                before = None if worker.problem or worker.report is None else _identity(worker.report)
                worker.take(report, time.monotonic())
                if _identity(report) != before:
                    self._notify()
        finally:
            call.cancel()


def _identity(report: WorkerReport) -> tuple[object, ...]:
    return report.health, report.role, report.instance


def _load(worker: _Watched, report: WorkerReport) -> WorkerLoad:
    free = report.pages.free + report.pages.cached
    queued = report.waiting_tokens
    if report.role == WORKER_ROLE_DECODE:
        free = max(0, free - worker.placed_tokens // max(1, report.page_tokens))
    else:
        queued += worker.placed_tokens
    return WorkerLoad(
        address=worker.address,
        codecs=dict(report.codecs),
        page_tokens=report.page_tokens,
        pages_total=report.pages.total,
        pages_free=free,
        queued_tokens=queued,
        requests=report.waiting_requests + report.running_requests,
    )


def _one_line(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return "cannot be reached (no process there, or no way to it)"
    details = (error.details() or "").splitlines() or [""]
    return f"{error.code().name}: {details[0]}"
