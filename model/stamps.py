"""When an engine's step began and how large it is, and from when on it must be taken for stuck."""

from dataclasses import dataclass

LOOK_S = 0.25  # between two looks at whether a step goes on
STUCK_S = 5.0  # of a step that should take no time
TIMES = 5.0  # so many times longer than expected may it take beyond that
UNMEASURED_S, UNMEASURED_TOKEN_S = 300.0, 1.0  # of the first steps: kernels may have to be compiled for them
MEASURED = 3  # steps after which what a token takes is known
STEP_TOKENS = 16  # what a step takes beside its tokens, in tokens
_NEWEST = 0.2  # weight of the newest measurement


@dataclass(frozen=True, eq=False)
class Stamp:
    """A piece of work of the engine thread; `eq=False`: no two are the same."""

    began_s: float
    tokens: int  # that it computes; 0: it computes none
    measured: bool = True  # whether the time it takes tells what a token takes


class Stamps:
    """Written by the engine thread, read by any other. Its clock is the caller's.

    How long a step goes on already is counted in looks, not by a clock: a process that was stopped for a while, or
    gets no time on a busy machine, makes none.
    """

    def __init__(self) -> None:
        self.current: Stamp | None = None
        self._token_s = 0.0  # that a token takes, those of STEP_TOKENS counted
        self._measured = 0
        self._seen: Stamp | None = None
        self._looks = 0

    def begin(self, now_s: float, tokens: int, *, measured: bool = True) -> Stamp | None:
        """Work begins; returns what it interrupts, for `end`."""
        outer, self.current = self.current, Stamp(now_s, tokens, measured)
        return outer

    def end(self, now_s: float, outer: Stamp | None) -> None:
        """Work has ended, well or not; what it interrupted goes on, and has its whole time again, but tells no more
        what a token takes."""
        done = self.current
        if done is not None and done.tokens and done.measured:
            token_s = (now_s - done.began_s) / (done.tokens + STEP_TOKENS)
            weight = max(_NEWEST, 1 / (self._measured + 1))
            self._token_s += weight * (token_s - self._token_s)
            self._measured += 1
        self.current = Stamp(now_s, outer.tokens, measured=False) if outer is not None else None

    def clear(self) -> None:
        """The thread is between two pieces of work."""
        self.current = None

    def bound_s(self, tokens: int) -> float:
        """Seconds after which a step of so many tokens is taken for stuck."""
        if self._measured < MEASURED:
            return UNMEASURED_S + UNMEASURED_TOKEN_S * tokens
        return STUCK_S + TIMES * self._token_s * (tokens + STEP_TOKENS)

    def look(self) -> float | None:
        """Called each LOOK_S: the seconds for which the thread is at the same work, where these are too many."""
        stamp = self.current
        if stamp is None or stamp is not self._seen:
            self._seen, self._looks = stamp, 0
            return None
        self._looks += 1
        seconds = self._looks * LOOK_S
        return seconds if seconds > self.bound_s(stamp.tokens) else None
