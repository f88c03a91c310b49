"""What one request remembers of the decode workers that failed it. Pure: time comes in as an argument."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ...proto.backoff import backoff_s
from ...proto.errors import Exhausted, IsthmusError

FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 4.0  # before a worker that failed and still lives is asked again


@dataclass(frozen=True)
class _Failed:
    at_s: float
    incarnation: int
    times: int

    def is_back(self, now_s: float, incarnation: int) -> bool:
        """Whether it may be asked again: it was started anew, or some time has passed."""
        pause_s = backoff_s(self.times, FIRST_PAUSE_S, LAST_PAUSE_S)
        return incarnation != self.incarnation or now_s >= self.at_s + pause_s


@dataclass(kw_only=True)
class Failures:
    """The failed attempts of one request; `limit` of them are followed by another one."""

    limit: int
    wait_s: float  # how long the request waits for a worker after each of them
    count: int = 0
    last: IsthmusError | None = None
    _since_s: float | None = None  # when the wait began
    _workers: dict[str, _Failed] = field(default_factory=dict)

    def add(self, worker: str, error: IsthmusError, now_s: float, incarnation: int) -> None:
        """Counts an attempt that failed on `worker`; a worker that is started anew has another incarnation."""
        before = self._workers.get(worker)
        self._workers[worker] = _Failed(now_s, incarnation, before.times + 1 if before else 1)
        self.count, self.last, self._since_s = self.count + 1, error, None

    def avoid(self, now_s: float, incarnation: Callable[[str], int]) -> Iterator[set[str]]:
        """The workers to leave out: first all that failed, then only those that are not back; nothing once spent."""
        if self.count > self.limit:
            return
        yield set(self._workers)
        away = {name for name, failed in self._workers.items() if not failed.is_back(now_s, incarnation(name))}
        if len(away) < len(self._workers):
            yield away

    def wait_left(self, now_s: float, *, started: bool) -> float:
        """Seconds that the request may still wait for a place; `started` where its client has tokens already.

        A request that found every worker full is refused at once, unless it was started.
        """
        if self._since_s is None:
            self._since_s = now_s
        if self.count > self.limit or (isinstance(self.last, Exhausted) and not started):
            return 0.0
        return self._since_s + self.wait_s - now_s
