"""One worker as the gateway knows it: its last report, what was placed on it since, how long it has been silent.

Pure: time comes in as an argument.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...proto.errors import InvalidRequest
from ...proto.rpc.addresses import HostPort, parse_address
from ...proto.worker_pb2 import WORKER_HEALTH_READY, WORKER_ROLE_DECODE, WorkerReport
from ..router.worker_columns import PrefillTime, StepTime, WorkerLoad

SUSPECT_S = 1.0  # without a report (they come every HEARTBEAT_S): no new work where another worker can take it
OUT_S = 3.0  # no work at all, and what runs there is given up
REPORT_LAG_S = 0.2  # a report may be older than what was placed this long before it came


@dataclass(frozen=True)
class _Placed:
    at_s: float
    tokens: int
    pages: int


@dataclass
class Watched:
    """The state of one worker; `problem` is empty while reports come."""

    address: str
    heard_s: float  # when it was last heard of, or added
    report: WorkerReport | None = None
    problem: str = "not reached yet"
    incarnation: int = 0  # times that it was reached
    calls: set[Callable[[], None]] = field(default_factory=set)  # that give up what runs there
    verified: str | None = None  # the instance that has passed its preflight
    unfit: tuple[str, str] | None = None  # an instance that has failed it, and why
    news: bool = True  # whether the last report, with what was placed since, says other than the one before
    _placed: deque[_Placed] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        """Whether it reports and says that it takes work."""
        return self.report is not None and not self.problem and self.report.health == WORKER_HEALTH_READY

    @property
    def is_verified(self) -> bool:
        """Whether it has passed its preflight since it was started."""
        return self.report is not None and self.verified == self.report.instance

    @property
    def is_flipped(self) -> bool:
        """Whether its process has passed a preflight in another role."""
        if self.report is None or self.verified is None or self.is_verified:
            return False
        return self.verified.partition(".")[0] == self.report.instance.partition(".")[0]

    @property
    def peer_address(self) -> str:
        """Where other workers dial it: as it was told to advertise, else as the gateway does.

        Where only the gateway's host can dial that, as the worker found itself, if that is any better.
        """
        if self.report is None:
            return self.address
        told, own = _address(self.report.advertise), _address(self.report.address)
        if told is not None:
            return str(told)
        listed = _address(self.address)
        here = listed is None or listed.is_any or listed.is_loopback
        return str(own) if here and own is not None and not own.is_loopback and not own.is_any else self.address

    def take(self, report: WorkerReport, now_s: float) -> bool:
        """A report came; whether it changes what the worker may be used for."""
        before = None if self.problem else self.report
        restarted = self.report is not None and report.instance != self.report.instance
        self.incarnation += before is None or restarted
        if before is not None:
            before.uptime_ms = report.uptime_ms  # which is no news
        same = report == before
        self.news = bool(self._placed) or not same
        self.report, self.problem, self.heard_s = report, "", now_s
        while self._placed and (restarted or self._placed[0].at_s < now_s - REPORT_LAG_S):
            self._placed.popleft()
        return not same and (before is None or restarted or _kind(before) != _kind(report))

    def placed(self, now_s: float, tokens: int, pages: int) -> None:
        """Counts work until a report shows it."""
        self._placed.append(_Placed(now_s, tokens, pages))

    def load(self, *, suspect: bool, known_as: Mapping[str, str]) -> WorkerLoad:
        """What the router reads, with what was placed since the report; `known_as`: addresses by `peer_address`."""
        report = self.report
        assert report is not None, "no worker without a report is routed to"
        tokens = sum(placed.tokens for placed in self._placed)
        pages = sum(placed.pages for placed in self._placed)
        decode = report.role == WORKER_ROLE_DECODE
        rate, step = report.prefill_rate, report.step_rate
        return WorkerLoad(
            address=self.address,
            codecs=dict(report.codecs),
            page_tokens=report.page_tokens,
            pages_total=report.pages.total,
            pages_free=max(0, report.pages.free + report.pages.cached - (pages if decode else 0)),
            queued_tokens=report.waiting_tokens + (0 if decode else tokens),
            requests=report.waiting_requests + report.running_requests + len(self._placed),
            prefill=PrefillTime(rate.ms, rate.ms_per_token, rate.ms_per_token_ktoken)
            if report.HasField("prefill_rate")
            else None,
            step=StepTime(step.ms, step.ms_per_sequence, step.ms_per_page) if report.HasField("step_rate") else None,
            links={known_as.get(peer, peer): rate for peer, rate in report.link_bytes_per_ms.items()},
            suspect=suspect,
        )


def _address(text: str) -> HostPort | None:
    try:
        return parse_address(text, to_dial=True)
    except InvalidRequest:
        return None


def _kind(report: WorkerReport) -> tuple[object, ...]:
    """What decides whether and with whom a worker may be used."""
    return (
        *(report.health, report.role, report.instance, report.protocol_version, report.model.fingerprint),
        *(report.page_tokens, report.default_codec, dict(report.codecs)),
    )
