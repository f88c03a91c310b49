"""How long to wait before the next try."""

from dataclasses import dataclass

_MOST_DOUBLINGS = 32  # more would tell nothing, and overflow one day: whoever is away may be away for hours


def backoff_s(failures: int, first_s: float, last_s: float) -> float:
    """`first_s` after the first failure, twice as long after each further one, at most `last_s`."""
    return min(first_s * 2 ** min(failures - 1, _MOST_DOUBLINGS), last_s)


@dataclass
class Lives:
    """How often somebody has ended, without ever having been well for long, and when it may begin anew.

    Time comes in as an argument.
    """

    first_s: float
    last_s: float
    healthy_s: float  # a life of so long is forgiven
    ends: int = 0  # in a row
    next_s: float = 0.0  # when the next life may begin
    _began_s: float | None = None

    def began(self, now_s: float) -> None:
        """It is there, and well."""
        self._began_s = now_s

    def ended(self, now_s: float) -> None:
        """It has ended, or could not begin."""
        if self._began_s is not None and now_s - self._began_s >= self.healthy_s:
            self.ends = 0
        self._began_s = None
        self.ends += 1
        self.next_s = now_s + backoff_s(self.ends, self.first_s, self.last_s)

    def reason(self, now_s: float) -> str:
        """For whoever asks why it is not there."""
        left_s = self.next_s - now_s
        times = "once" if self.ends == 1 else f"{self.ends} times"
        return f"ended {times}; " + (f"next start in {left_s:.0f} s" if left_s >= 0.5 else "is being started")
