"""The I/O of the fleet: one `Worker.Watch` stream for each worker, reconnected as long as it is wanted, feeds the
worker table."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import grpc.aio

from ...proto.backoff import backoff_s
from ...proto.errors import Unavailable
from ...proto.rpc.statuses import is_unreached, tls_problem
from ...proto.rpc.transport import Transport
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import WORKER_HEALTH_DRAINING, WatchRequest, WorkerHealth, WorkerReport
from ...proto.worker_pb2_grpc import WorkerStub
from ..router.costs import Demand
from ..router.router import Placement
from .compatibility import Requirements
from .replays import InFlightReplays
from .report import Health, Report
from .worker_table import OUT_S, Member, WorkerTable

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 1.0
QUICK_RETRIES = 10  # after the first pause each: a worker that changes its role is back in half a second
CHECK_S = 0.25  # between two checks for workers that are silent


class Fleet:
    """Watches workers, and owns their streams and channels. Belongs to one event loop; `close` ends everything.

    `table` is for reading; what changes it goes through the methods here, which have the clock.
    """

    def __init__(
        self,
        required: Requirements,
        transport: Transport,
        *,
        verify: bool = False,
        failures: "Counter[str] | None" = None,
    ) -> None:
        """With `verify` no worker is used before `judge` has found it fit. `failures`: see `Tasks`."""
        self.table = WorkerTable(required, verify=verify)
        self.tasks = Tasks(failures)
        self._transport = transport
        self.replays = InFlightReplays()
        self.away_reasons: dict[str, Callable[[], str]] = {}  # by address: why a worker is away, from its supervisor
        self._reports: dict[str, WorkerReport] = {}  # the last ones, in full
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._decode_channels: dict[str, grpc.aio.Channel] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._calls: dict[str, set[Callable[[], None]]] = {}  # that give up what runs on a worker
        self._changed = asyncio.Event()
        self._published = self.table.version
        self._checking: asyncio.Task[None] | None = None

    def add(self, address: str) -> None:
        """Starts to watch a worker; nothing happens where it is watched already."""
        if self._checking is None:
            self._checking = self.tasks.start("look for silent workers", self._check)
        if address not in self.table:
            self.table.add(address, time.monotonic())
            self._calls[address] = set()
            self._channels[address] = self._transport.dial(address, "worker")
            self._streams[address] = self._start_stream(address)

    def _start_stream(self, address: str) -> asyncio.Task[None]:
        return self.tasks.start("watch a worker", partial(self._watch, address), about=address, vital=False)

    async def remove(self, address: str) -> None:
        """Forgets a worker: at once, so that one that is added at the same address meanwhile is another one."""
        if address not in self.table:
            return
        for give_up in tuple(self._calls[address]):  # what runs there is placed anew
            give_up()
        stream, channels = self._streams.pop(address), [self._channels.pop(address)]
        if (decode := self._decode_channels.pop(address, None)) is not None:
            channels.append(decode)
        for by_address in (self.away_reasons, self._reports, self._calls):
            by_address.pop(address, None)
        self.table.remove(address, time.monotonic())
        self._publish()
        try:
            await self.tasks.end(stream)
        finally:
            await asyncio.gather(*(channel.close() for channel in channels))

    async def close(self) -> None:
        """Forgets all workers."""
        for address in self.table.addresses:
            await self.remove(address)
        await self.tasks.stop()

    def channel(self, address: str) -> grpc.aio.Channel:
        """The open channel to a worker; KeyError where it is gone."""
        return self._channels[address]

    def decode_channel(self, address: str) -> grpc.aio.Channel:
        """A channel to a worker that must be a decode worker by its certificate, for what it shall compute; KeyError
        where it is gone. Orders and reports go to a worker of either role."""
        if self._transport.security is None:
            return self._channels[address]
        if address not in self._channels:
            raise KeyError(address)
        if address not in self._decode_channels:
            self._decode_channels[address] = self._transport.dial(address, "decode")
        return self._decode_channels[address]

    @contextlib.contextmanager
    def calling(self, address: str, give_up: Callable[[], None]) -> Iterator[None]:
        """Around a call of a worker: `give_up` is called when the worker is out (no sign of life for OUT_S)."""
        calls = self._calls.get(address)
        if calls is None:
            raise Unavailable(f"worker {address} left")
        calls.add(give_up)
        try:
            yield
        finally:
            calls.discard(give_up)

    def statuses(self) -> list[WorkerReport]:
        """The last report of each worker, its health as the gateway sees it, sorted by role and id."""
        statuses, now_s = list[WorkerReport](), time.monotonic()
        for address in self.table.addresses:
            status = WorkerReport()
            status.CopyFrom(self._reports.get(address) or WorkerReport(worker_id=address))
            status.address = address
            health, reason = self.table.health(address, now_s)
            if health is Health.UNREACHABLE and address in self.away_reasons:
                reason = f"{self.away_reasons[address]()} ({reason})"
            if health is not None:
                status.health = WorkerHealth.ValueType(health)
            if reason:
                status.reason = reason
            statuses.append(status)
        return sorted(statuses, key=lambda status: (status.role, status.worker_id))

    @property
    def change(self) -> asyncio.Event:
        """Is set at the next change of a worker's health or of the set of workers; a new one replaces it."""
        return self._changed

    def judge(self, worker: Member, failure: str | None) -> None:
        """The outcome of a worker's preflight; see `WorkerTable.judge`."""
        self.table.judge(worker, failure, time.monotonic())
        self._publish()

    def place(self, demand: Demand, placement: Placement) -> None:
        """Counts a placement until reports show it."""
        self.table.place(demand, placement, time.monotonic())

    def failed(self, address: str) -> None:
        """A request failed on a worker, for a reason that may be the worker's."""
        with self._logged_ejection(address) as now_s:
            self.table.failed(address, now_s)

    def served(self, address: str, *, took_ms: float = 0.0, expected_ms: float = 0.0) -> None:
        """A worker did what it was asked to."""
        with self._logged_ejection(address) as now_s:
            self.table.served(address, now_s, took_ms=took_ms, expected_ms=expected_ms)

    @contextlib.contextmanager
    def _logged_ejection(self, address: str) -> Iterator[float]:
        now_s = time.monotonic()
        before = self.table.is_ejected(address, now_s)
        yield now_s
        if self.table.is_ejected(address, now_s) != before:
            log.warning("a worker is %s", "taken back" if before else "ejected", extra={"fields": {"worker": address}})

    def _publish(self) -> None:
        """Sets `change` where the table has changed."""
        if self.table.version != self._published:
            self._published = self.table.version
            self._changed.set()
            self._changed = asyncio.Event()

    async def _check(self) -> None:
        """Finds workers that have fallen silent."""
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            now_s = time.monotonic()
            stalled_s, last_s = now_s - last_s - CHECK_S, now_s
            for address in self.table.check_silence(now_s, stalled_s if stalled_s > CHECK_S else 0.0):
                self._give_up(address)

    def _give_up(self, address: str) -> None:
        """A worker is out: what runs there is placed anew, and its stream is opened anew."""
        for give_up in tuple(self._calls[address]):
            give_up()
        if not self.table.is_lost(address):
            self._lost(address, f"no report for {OUT_S:g} s")
            self._streams[address].cancel()
            self._streams[address] = self._start_stream(address)

    def _lost(self, address: str, problem: str) -> None:
        last = self._reports.get(address)
        drained = last is not None and last.health == WORKER_HEALTH_DRAINING
        if drained:
            problem = f"was drained, to end or to change its role; {problem}"
        if self.table.mark_lost(address, problem, time.monotonic()):
            if drained:
                log.info("a worker left", extra={"fields": {"worker": address}})
            else:
                log.warning("lost a worker", extra={"fields": {"worker": address, "problem": problem}})
            self._publish()

    async def _watch(self, address: str) -> None:
        tries = 0
        while True:
            incarnation = self.table.incarnation(address)
            try:
                if await self._follow(address):  # it wants another one, which may find another connection
                    await asyncio.sleep(FIRST_RETRY_S)
                    continue
                problem = "ended its report stream at once"
            except grpc.aio.AioRpcError as error:
                problem = _one_line(error)
            except Exception as error:  # a bug here: the worker is not used until its reports can be
                self._lost(address, f"its reports cannot be used ({type(error).__name__}); see the gateway's log")
                raise
            tries = tries + 1 if self.table.incarnation(address) == incarnation else 1
            self._lost(address, problem)
            await asyncio.sleep(backoff_s(max(1, tries - QUICK_RETRIES + 1), FIRST_RETRY_S, LAST_RETRY_S))

    async def _follow(self, address: str) -> bool:
        """Takes the reports of one stream, to its end; whether there were any."""
        any_came = False
        call = WorkerStub(self._channels[address]).Watch(WatchRequest())
        try:
            while isinstance(report := await call.read(), WorkerReport):
                self._reports[address], any_came = report, True
                self.table.report(address, Report.from_pb(report), time.monotonic())
                self._publish()
            return any_came
        finally:
            call.cancel()


def _one_line(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        if is_unreached(error) and (problem := tls_problem(error)):
            return f"answers, but {problem}"
        return "cannot be reached (no process there, or no way to it)"
    details = (error.details() or "").splitlines() or [""]
    return f"{error.code().name}: {details[0]}"
