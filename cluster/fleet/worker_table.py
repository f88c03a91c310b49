"""The table of workers: what is known of each, which may take work, and the columns that the router reads.

Pure: reports and time come in as arguments, there is no I/O, no clock and no event loop. The registry feeds it from
report streams; a simulator can feed it too:

    table = WorkerTable(requirements)
    table.add("a:1", now_s)
    table.report("a:1", report, now_s)
    placement = route(demand, table.routing)
    table.place(demand, placement, now_s)
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..router.costs import Demand
from ..router.router import Placement
from ..router.routing_table import RoutingTable
from ..router.worker_columns import WorkerColumns
from .compatibility import Requirements, incompatibilities
from .outliers import Outliers
from .report import Health, Report, Role
from .worker_entry import WorkerEntry

SUSPECT_S = 1.0  # without a report (the period: worker/service.py): no new work where others can take it
OUT_S = 3.0  # no work at all, and what runs there is given up


class Member(NamedTuple):
    """A worker under the address that the gateway dials."""

    address: str
    report: Report


class WorkerTable:
    """All workers by address."""

    def __init__(self, required: Requirements, *, verify: bool = False) -> None:
        """With `verify` no worker takes work before `judge` has found it fit."""
        self._required = required
        self._verify = verify
        self._entries: dict[str, WorkerEntry] = {}
        self._reasons: dict[str, str] = {}  # why workers may not be used, by address
        self._address_of_peer: dict[str, str] = {}  # addresses by those that other workers dial
        self._outliers: dict[Role, Outliers] = {"prefill": Outliers(), "decode": Outliers()}
        self.routing = RoutingTable()  # the workers that take new work
        self.version = 0  # changes with the set of workers, and with what one may be used for
        self.gateways = 1  # that use these workers
        self.usable_s: float | None = None  # when workers of both roles took work last, at a change; None: never

    def __contains__(self, address: str) -> bool:
        return address in self._entries

    @property
    def addresses(self) -> list[str]:
        """Of all workers, in the order in which they were added."""
        return list(self._entries)

    def add(self, address: str, now_s: float) -> None:
        """A worker that has not reported yet."""
        self._entries[address] = WorkerEntry(address, now_s)

    def remove(self, address: str, now_s: float) -> None:
        """Forgets a worker."""
        del self._entries[address]
        for outliers in self._outliers.values():
            outliers.remove(address)
        self._refresh(now_s)

    def report(self, address: str, report: Report, now_s: float) -> None:
        """Takes in a worker's report."""
        entry = self._entries[address]
        incarnation = entry.incarnation
        changed = entry.update(report, now_s)
        outliers = self._outliers_of(entry)
        if entry.incarnation != incarnation and outliers is not None:
            outliers.add(address)
        if changed:
            self._refresh(now_s)
        elif entry.load_changed:  # an idle worker says the same again and again
            self._update_columns(entry, now_s)

    def mark_lost(self, address: str, problem: str, now_s: float) -> bool:
        """A worker cannot be reached; whether it could be before."""
        entry = self._entries[address]
        was_up = not entry.problem
        entry.problem = problem
        if was_up:
            self._refresh(now_s)
        return was_up

    def check_silence(self, now_s: float, stalled_s: float = 0.0) -> list[str]:
        """Takes silent workers for suspects; returns those that have been silent for OUT_S.

        `stalled_s`: time since the last check in which no report could be heard, for reasons of this process.
        """
        out = []
        for entry in self._entries.values():
            entry.heard_s += stalled_s
            workers = self._columns_of(entry)
            if now_s - entry.heard_s > OUT_S:
                out.append(entry.address)
            elif workers is not None and workers.loads[entry.address].suspect != self._is_suspect(entry, now_s):
                self._update_columns(entry, now_s)
        return out

    def is_lost(self, address: str) -> bool:
        """Whether no reports come from a worker."""
        return bool(self._entries[address].problem)

    def incarnation(self, address: str) -> int:
        """A number that changes when a worker was away and is back; 0 where it is gone or was never reached."""
        entry = self._entries.get(address)
        return entry.incarnation if entry is not None else 0

    def peer_addresses(self, addresses: Sequence[str]) -> list[str]:
        """Where other workers dial these."""
        entries = [(address, self._entries.get(address)) for address in addresses]
        return [address if entry is None else entry.peer_address for address, entry in entries]

    def address_of_peer(self, peer_address: str) -> str:
        """The address here of a worker that others dial at `peer_address`."""
        return self._address_of_peer.get(peer_address, peer_address)

    def default_codec(self) -> str:
        """The default of the decode workers (the same for all unless settings are mixed); "" with none."""
        defaults = [
            entry.report.default_codec
            for entry in self._entries.values()
            if entry.report is not None and entry.report.role == "decode" and not entry.problem
        ]
        return min(defaults, default="")

    def health(self, address: str, now_s: float) -> tuple[Health | None, str]:
        """The gateway's view of a worker, and why; None where it is as the worker reports."""
        entry = self._entries[address]
        if entry.problem:
            return Health.UNREACHABLE, entry.problem
        if address in self._reasons:
            return Health.INCOMPATIBLE, self._reasons[address]
        if entry.ready and not self._is_fit(entry):
            if entry.unfit is not None and entry.report is not None and entry.unfit[0] == entry.report.instance:
                return Health.UNFIT, entry.unfit[1]
            return Health.CHECKING, "its canary request is not done yet"
        if entry.ready and self._is_suspect(entry, now_s):
            return None, "gets no new work: it failed, lags behind or reports late"
        return None, ""

    def to_verify(self) -> tuple[list[Member], list[Member]]:
        """Ready workers that could be paired: those not verified yet, and those that are."""
        unverified, verified = list[Member](), list[Member]()
        for entry in self._entries.values():
            if entry.ready and entry.report is not None and entry.address not in self._reasons:
                (verified if self._is_fit(entry) else unverified).append(Member(entry.address, entry.report))
        return unverified, verified

    def is_flipped(self, address: str) -> bool:
        """Whether the worker's process has passed a preflight in another role."""
        entry = self._entries.get(address)
        return entry is not None and entry.is_flipped

    def judge(self, worker: Member, failure: str | None, now_s: float) -> None:
        """The outcome of a preflight, for the instance that was checked: None where it passed, else why not.

        An instance that has passed once stays verified.
        """
        entry, instance = self._entries.get(worker.address), worker.report.instance
        if entry is None or entry.verified == instance:
            return
        if failure is None:
            entry.verified, entry.unfit = instance, None
        else:
            entry.unfit = (instance, failure)
        self._refresh(now_s)

    def place(self, demand: Demand, placement: Placement, now_s: float) -> None:
        """Counts a placement until reports show it."""
        pages = -(-demand.tokens // placement.page_tokens)
        missing = demand.prompt_tokens - round(placement.prefill_cached_tokens)
        for workers, address, tokens, used in (
            (self.routing.decode, placement.decode, 0, pages),
            *((self.routing.prefill, first, missing, 0) for first in placement.prefill[:1]),
        ):
            entry, row = self._entries.get(address), workers.row_of.get(address)
            if entry is None or row is None:
                continue
            workers.add_placement(row, tokens=tokens, pages=used, prefix_keys=demand.prefix_keys)
            entry.add_placement(now_s, tokens, used)
            outliers = self._outliers_of(entry)
            if outliers is not None:
                outliers.placed(address, now_s)
                if outliers.ejected(address, now_s):
                    self._update_columns(entry, now_s)

    def failed(self, address: str, now_s: float) -> None:
        """A request failed on a worker, for a reason that may be the worker's."""
        entry = self._entries.get(address)
        if entry is not None and (outliers := self._outliers_of(entry)) is not None:
            outliers.failed(address, now_s)
            self._update_columns(entry, now_s)

    def served(self, address: str, now_s: float, *, took_ms: float = 0.0, expected_ms: float = 0.0) -> None:
        """A worker did what it was asked to, in the time it took."""
        entry = self._entries.get(address)
        if entry is not None and (outliers := self._outliers_of(entry)) is not None:
            outliers.served(address, now_s, took_ms=took_ms, expected_ms=expected_ms)
            self._update_columns(entry, now_s)

    def is_ejected(self, address: str, now_s: float) -> bool:
        """Whether a worker gets no work now because it failed or lags behind."""
        entry = self._entries.get(address)
        outliers = self._outliers_of(entry) if entry is not None else None
        return outliers is not None and outliers.ejected(address, now_s)

    def _outliers_of(self, entry: WorkerEntry) -> Outliers | None:
        return self._outliers.get(entry.report.role) if entry.report and entry.report.role else None

    def _is_fit(self, entry: WorkerEntry) -> bool:
        return not self._verify or entry.is_verified

    def _is_suspect(self, entry: WorkerEntry, now_s: float) -> bool:
        return now_s - entry.heard_s > SUSPECT_S or self.is_ejected(entry.address, now_s)

    def _columns_of(self, entry: WorkerEntry) -> WorkerColumns | None:
        """Where a worker belongs in the routing table; None where it must not be used."""
        if not entry.ready or entry.report is None or entry.address in self._reasons or not self._is_fit(entry):
            return None
        return self.routing.prefill if entry.report.role == "prefill" else self.routing.decode

    def _update_columns(self, entry: WorkerEntry, now_s: float) -> None:
        workers = self._columns_of(entry)
        if workers is not None:
            suspect = self._is_suspect(entry, now_s)
            workers.update(entry.load(suspect=suspect, address_of_peer=self._address_of_peer))

    def _refresh(self, now_s: float) -> None:
        """Rebuilds what depends on several workers, as the set of them, or what one may be used for, has changed."""
        usable = len(self.routing.prefill) and len(self.routing.decode)
        reachable = {
            entry.address: entry.report
            for entry in self._entries.values()
            if entry.report is not None and not entry.problem
        }
        self._reasons = incompatibilities(reachable, self._required)
        self._address_of_peer = {entry.peer_address: entry.address for entry in self._entries.values()}
        for workers in (self.routing.prefill, self.routing.decode):
            for address in list(workers.row_of):
                entry = self._entries.get(address)
                if entry is None or self._columns_of(entry) is not workers:
                    workers.remove(address)
        for entry in self._entries.values():
            self._update_columns(entry, now_s)
        if usable or (len(self.routing.prefill) and len(self.routing.decode)):
            self.usable_s = now_s
        self.version += 1
