"""Which workers are checked with whom, and when. Pure: time comes in as an argument.

Each worker that is not verified is paired with one that is, or, where there is none, with another new one. One that
failed is tried again after a growing pause, with a partner that it was not paired with yet.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...proto.backoff import backoff_s
from .compatibility import share_codec
from .worker_table import Member

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 15.0


@dataclass
class _Failures:
    """Of one worker."""

    count: int = 0
    next_s: float = 0.0  # when it may be tried again
    partners: list[str] = field(default_factory=list)  # addresses of those that it failed with in this round


class CanarySchedule:
    """Remembers the failures of workers that are not verified."""

    def __init__(self) -> None:
        self._failures: dict[tuple[str, str], _Failures] = {}  # by address and instance

    def due(
        self, unverified: Sequence[Member], verified: Iterable[Member], busy: Iterable[str], now_s: float
    ) -> list[tuple[Member, Member]]:
        """Pairs of a prefill and a decode worker to check now; no worker is in two of them, or in `busy`."""
        taken, pairs, verified = set(busy), list[tuple[Member, Member]](), list(verified)
        known = {_key(worker) for worker in unverified}
        self._failures = {key: failures for key, failures in self._failures.items() if key in known}
        for worker in unverified:
            failures = self._failures.get(_key(worker), _Failures())
            if worker.address in taken or failures.next_s > now_s:
                continue
            partners = [partner for partner in verified if _can_pair(worker, partner)]
            partners += [p for p in unverified if _can_pair(worker, p) and p.address not in taken]
            if not partners:
                continue
            partner = min(partners, key=lambda p: p.address in failures.partners)  # the first one not tried yet
            taken.add(worker.address)
            if partner in unverified:
                taken.add(partner.address)
            pairs.append((worker, partner) if worker.report.role == "prefill" else (partner, worker))
        return pairs

    def record_failure(self, worker: Member, partner: Member, now_s: float) -> int:
        """Remembers a failure; how many there were."""
        failures = self._failures.setdefault(_key(worker), _Failures())
        failures.count += 1
        failures.next_s = now_s + backoff_s(failures.count, FIRST_RETRY_S, LAST_RETRY_S)
        if partner.address in failures.partners:
            failures.partners.clear()  # it has failed with all of them: the next round begins
        failures.partners.append(partner.address)
        return failures.count


def _key(worker: Member) -> tuple[str, str]:
    return worker.address, worker.report.instance


def _can_pair(one: Member, other: Member) -> bool:
    return {one.report.role, other.report.role} == {"prefill", "decode"} and share_codec(one.report, other.report)
