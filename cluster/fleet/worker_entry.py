"""One row of the worker table: a worker's last report, what was placed on it since, how long it has been silent.

Pure: time comes in as an argument.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...proto.errors import InvalidRequest
from ...proto.rpc.addresses import HostPort, parse_address
from ..router.worker_columns import WorkerLoad
from .report import Health, Report

REPORT_LAG_S = 0.2  # a report may be older than what was placed this long before it came


@dataclass(frozen=True)
class _Placed:
    at_s: float
    tokens: int
    pages: int


@dataclass
class WorkerEntry:
    """The state of one worker; `problem` is empty while reports come."""

    address: str
    heard_s: float  # when its last report came, or it was added
    report: Report | None = None
    problem: str = "not reached yet"
    incarnation: int = 0  # times that it was reached
    verified: str | None = None  # the instance that has passed its preflight
    unfit: tuple[str, str] | None = None  # an instance that has failed it, and why
    load_changed: bool = True  # whether the last report, with the placements since, differs from the one before
    _placed: deque[_Placed] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        """Whether it reports and says that it takes work."""
        return self.report is not None and not self.problem and self.report.health is Health.READY

    @property
    def is_verified(self) -> bool:
        """Whether it has passed its preflight since it was started."""
        return self.report is not None and self.verified == self.report.instance

    @property
    def is_flipped(self) -> bool:
        """Whether its process has passed a preflight in another role."""
        if self.report is None or self.verified is None or self.is_verified:
            return False
        return self.verified.partition(".")[0] == self.report.process

    @property
    def peer_address(self) -> str:
        """Where other workers dial it: the address that it was configured to advertise, else the gateway's own.

        Where only the gateway's host can dial that, the address that the worker found itself, if that is any better.
        """
        if self.report is None:
            return self.address
        advertised, own = _address(self.report.advertise), _address(self.report.own_address)
        if advertised is not None:
            return str(advertised)
        listed = _address(self.address)
        here = listed is None or listed.is_any or listed.is_loopback
        return str(own) if here and own is not None and not own.is_loopback and not own.is_any else self.address

    def update(self, report: Report, now_s: float) -> bool:
        """Takes in a report; whether it changes what the worker may be used for."""
        before = None if self.problem else self.report
        restarted = self.report is not None and report.instance != self.report.instance
        self.incarnation += before is None or restarted
        self.load_changed = bool(self._placed) or report != before
        self.report, self.problem, self.heard_s = report, "", now_s
        while self._placed and (restarted or self._placed[0].at_s < now_s - REPORT_LAG_S):
            self._placed.popleft()
        return before is None or before.pairing != report.pairing

    def add_placement(self, now_s: float, tokens: int, pages: int) -> None:
        """Counts a request until a report shows it."""
        self._placed.append(_Placed(now_s, tokens, pages))

    def load(self, *, suspect: bool, address_of_peer: Mapping[str, str]) -> WorkerLoad:
        """What the router reads, with the placements since the report; `address_of_peer`: addresses by
        `peer_address`."""
        report = self.report
        assert report is not None, "no worker without a report is routed to"
        tokens = sum(placed.tokens for placed in self._placed)
        pages = sum(placed.pages for placed in self._placed)
        decode = report.role == "decode"
        return WorkerLoad(
            address=self.address,
            codecs=report.codecs,
            page_tokens=report.page_tokens,
            pages_total=report.pages_total,
            pages_free=max(0, report.pages_free - (pages if decode else 0)),
            queued_tokens=report.waiting_tokens + (0 if decode else tokens),
            requests=report.waiting_requests + report.running_requests + len(self._placed),
            prefill=report.prefill,
            step=report.step,
            links={address_of_peer.get(peer, peer): rate for peer, rate in report.links.items()},
            suspect=suspect,
        )


def _address(text: str) -> HostPort | None:
    try:
        return parse_address(text, to_dial=True)
    except InvalidRequest:
        return None
