"""Workers that fail or lag far behind the others get no new work for a while, and then one request to show that they
are well again. Pure: time comes in as an argument.

As outlier detection in Envoy: consecutive failures eject, each ejection lasts longer than the one before, and never
more than half of the workers are out.
"""

from dataclasses import dataclass
from statistics import median

from ...proto.backoff import backoff_s

FAILURES = 3  # in a row
SLOW, SLOW_SAMPLES = 5.0, 8  # times slower than the median of the workers, over about that many requests
FIRST_S, LAST_S = 5.0, 60.0  # of an ejection


@dataclass
class _Record:
    failures: int = 0  # in a row
    lag: float = 1.0  # time taken for time expected, averaged
    samples: int = 0
    ejections: int = 0
    until_s: float | None = None  # None: takes work
    probing: bool = False  # one request is under way to see whether it is well


class Outliers:
    """The workers of one role."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def add(self, worker: str) -> None:
        """A worker is new, or was started anew."""
        self._records[worker] = _Record()

    def remove(self, worker: str) -> None:
        """Forgets a worker."""
        self._records.pop(worker, None)

    def failed(self, worker: str, now_s: float) -> None:
        """A request failed there, for a reason that may be the worker's."""
        record = self._records.get(worker)
        if record is not None:
            record.failures += 1
            if record.failures >= FAILURES or record.until_s is not None:
                self._eject(record, now_s)

    def served(self, worker: str, now_s: float, *, took_ms: float = 0.0, expected_ms: float = 0.0) -> None:
        """A request was served there, in the time it took."""
        record = self._records.get(worker)
        if record is None:
            return
        record.failures = 0
        if expected_ms > 0:
            record.samples += 1
            record.lag += (took_ms / expected_ms - record.lag) / min(record.samples, SLOW_SAMPLES)
        if self._is_slow(record):
            self._eject(record, now_s)
            record.lag, record.samples = 1.0, 0  # what follows decides anew
        elif record.until_s is not None:
            record.until_s, record.probing, record.ejections = None, False, 0

    def ejected(self, worker: str, now_s: float) -> bool:
        """Whether it shall get no work now; once its time is over, it may get one request."""
        record = self._records.get(worker)
        if record is None or record.until_s is None:
            return False
        return record.probing or now_s < record.until_s

    def placed(self, worker: str, now_s: float) -> None:
        """Work goes there: for one whose time is over, the only one until its outcome is known."""
        record = self._records.get(worker)
        if record is not None and record.until_s is not None and now_s >= record.until_s:
            record.probing = True

    def _is_slow(self, record: _Record) -> bool:
        lags = [other.lag for other in self._records.values() if other.samples]
        return record.samples >= SLOW_SAMPLES and len(lags) > 2 and record.lag > SLOW * max(1.0, median(lags))

    def _eject(self, record: _Record, now_s: float) -> None:
        out = sum(other.until_s is not None for other in self._records.values() if other is not record)
        record.failures, record.probing = 0, False
        if 2 * (out + 1) <= len(self._records):
            record.ejections += 1
            record.until_s = now_s + backoff_s(record.ejections, FIRST_S, LAST_S)
