"""How long to wait before the next try, whatever is tried."""

from dataclasses import dataclass

_MOST_DOUBLINGS = 32  # many more would overflow a float, and failures may go on for days


def backoff_s(failures: int, first_s: float, last_s: float) -> float:
    """`first_s` after the first failure, twice as long after each further one, at most `last_s`."""
    return min(first_s * 2 ** min(failures - 1, _MOST_DOUBLINGS), last_s)


@dataclass
class Restarts:
    """How often something that shall run has ended without having run for long, and when it may be started again.

    Time comes in as an argument.
    """

    first_s: float
    last_s: float
    healthy_s: float  # once it has run for so long, what was before does not count
    ends: int = 0  # in a row
    next_s: float = 0.0  # when it may be started again
    _began_s: float | None = None

    def began(self, now_s: float) -> None:
        """It runs now."""
        self._began_s = now_s

    def ended(self, now_s: float) -> None:
        """It has ended, or could not be started."""
        if self._began_s is not None and now_s - self._began_s >= self.healthy_s:
            self.ends = 0
        self._began_s = None
        self.ends += 1
        self.next_s = now_s + backoff_s(self.ends, self.first_s, self.last_s)

    def reason(self, now_s: float) -> str:
        """Why it does not run, in a few words."""
        left_s = self.next_s - now_s
        times = "once" if self.ends == 1 else f"{self.ends} times"
        return f"ended {times}; " + (f"next start in {left_s:.0f} s" if left_s >= 0.5 else "is being started")
