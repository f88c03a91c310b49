"""How many requests of batch jobs may run now: they fill what is idle, and make room as soon as other requests come.

Their number grows by one every PERIOD_S while nothing waits anywhere, and shrinks by a quarter where something does
(additive increase, multiplicative decrease: Chiu and Jain 1989). Pure: the load comes in as an argument.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ....proto.worker_pb2 import WORKER_HEALTH_READY, WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerReport

PERIOD_S = 0.1  # between two updates
LEAST_FREE = 0.25  # of the pages of the emptiest decode worker, that batch requests leave to others
MOST_LAG_S = 0.03  # of the gateway's event loop
SHARE_BESIDE_OTHERS = 8  # while others run, one in so many of the largest number


@dataclass(frozen=True, kw_only=True)
class ClusterLoad:
    """What a limit depends on, now."""

    workers: bool  # at least one of each role is ready
    waiting: int  # requests that wait at any worker
    free_share: float  # free and cached pages of the emptiest decode worker, 0 to 1
    others: int  # requests at this gateway that are no batch
    lag_s: float  # of the event loop


def load_of(reports: Iterable[WorkerReport], others: int, lag_s: float) -> ClusterLoad:
    """The load by the last reports of the workers."""
    ready = [report for report in reports if report.health == WORKER_HEALTH_READY]
    decode = [report.pages for report in ready if report.role == WORKER_ROLE_DECODE]
    shares = [(pages.free + pages.cached) / pages.total for pages in decode if pages.total]
    return ClusterLoad(
        workers=bool(decode) and any(report.role == WORKER_ROLE_PREFILL for report in ready),
        waiting=sum(report.waiting_requests for report in ready),
        free_share=max(shares, default=0.0),
        others=others,
        lag_s=lag_s,
    )


class BatchLimit:
    """The number of requests of batch jobs that may run at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._target = 1.0

    @property
    def target(self) -> int:
        """As of the last update."""
        return int(self._target)

    def update(self, load: ClusterLoad) -> int:
        """Takes in the load; the new target."""
        most = max(1, self._most // SHARE_BESIDE_OTHERS) if load.others else self._most
        if not load.workers:
            self._target = 0.0
        elif load.waiting or load.free_share < LEAST_FREE or load.lag_s > MOST_LAG_S:
            self._target = max(0.0 if load.others else 1.0, self._target * 0.75)
        else:
            self._target += 1.0
        self._target = min(self._target, float(most))
        return self.target
