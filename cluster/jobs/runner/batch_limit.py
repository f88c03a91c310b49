"""How many requests of batch jobs may run now: they fill what is idle, and make room as soon as somebody else comes.

The number of them grows by one at each look while nothing waits anywhere, and shrinks by a quarter where something does
(additive increase, multiplicative decrease: Chiu and Jain 1989). Pure: what is seen comes in as an argument.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ....proto.worker_pb2 import WORKER_HEALTH_READY, WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerReport

LOOK_S = 0.1
LEAST_FREE = 0.25  # of the pages of the emptiest decode worker, that batch requests leave to others
MOST_LAG_S = 0.03  # of the gateway's event loop
SHARE_BESIDE_OTHERS = 8  # while others run, one in so many of the largest number


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the workers and the gateway look like now."""

    workers: bool  # at least one of each role is ready
    waiting: int  # requests that wait at any worker
    free_share: float  # free and cached pages of the emptiest decode worker, 0 to 1
    others: int  # requests at this gateway that are no batch
    lag_s: float  # of the event loop


def look(reports: Iterable[WorkerReport], others: int, lag_s: float) -> Seen:
    """What the last reports of the workers say."""
    ready = [report for report in reports if report.health == WORKER_HEALTH_READY]
    decode = [report.pages for report in ready if report.role == WORKER_ROLE_DECODE]
    shares = [(pages.free + pages.cached) / pages.total for pages in decode if pages.total]
    return Seen(
        workers=bool(decode) and any(report.role == WORKER_ROLE_PREFILL for report in ready),
        waiting=sum(report.waiting_requests for report in ready),
        free_share=max(shares, default=0.0),
        others=others,
        lag_s=lag_s,
    )


class BatchRoom:
    """The number of requests of batch jobs that may run at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._target = 1.0

    @property
    def target(self) -> int:
        """As of the last update."""
        return int(self._target)

    def update(self, seen: Seen) -> int:
        """A look at the cluster; the new target."""
        most = max(1, self._most // SHARE_BESIDE_OTHERS) if seen.others else self._most
        if not seen.workers:
            self._target = 0.0
        elif seen.waiting or seen.free_share < LEAST_FREE or seen.lag_s > MOST_LAG_S:
            self._target = max(0.0 if seen.others else 1.0, self._target * 0.75)
        else:
            self._target += 1.0
        self._target = min(self._target, float(most))
        return self.target
