"""The watchdog of an engine thread: when a step began and how large it is, and from when on it is taken for stuck.

A step that says how far it is, from layer to layer, is watched in parts: a part takes a fraction of the step, and one
that hangs is found the sooner.
"""

from dataclasses import dataclass, replace

CHECK_S = 0.25  # between two checks of whether a step goes on
STUCK_S = 5.0  # of a part that should take no time
STUCK_FACTOR = 5.0  # so many times longer than expected may it take beyond that
UNMEASURED_S, UNMEASURED_TOKEN_S = 300.0, 1.0  # of the first steps: kernels may have to be compiled for them
MEASURED_STEPS = 3  # after which what a token adds to the longest part is known
STEP_TOKENS = 16  # what a step takes beside its tokens, in tokens
_NEWEST = 0.2  # weight of the newest measurement


@dataclass(frozen=True, eq=False)
class WatchedStep:
    """A part of a piece of work of the engine thread; `eq=False`: no two are the same."""

    began_s: float  # the work
    part_s: float  # this part of it, by the same clock
    tokens: int  # that the work computes; 0: it computes none
    measured: bool = True  # whether the time it takes says what a token takes
    longest_s: float = 0.0  # how long the longest part before this one took


class Watchdog:
    """Written by the engine thread, read by any other. Its clock is the caller's.

    For how long a step has gone on already is counted in checks, not by a clock: a process that was stopped for a
    while, or gets no time on a busy machine, makes none.
    """

    def __init__(self) -> None:
        self.current: WatchedStep | None = None
        self._token_s = 0.0  # that a token adds to the longest part, those of STEP_TOKENS counted
        self._measured = 0
        self._checked: WatchedStep | None = None
        self._checks = 0

    def begin(self, now_s: float, tokens: int, *, measured: bool = True) -> WatchedStep | None:
        """Work begins; returns what it interrupts, for `end`."""
        outer, self.current = self.current, WatchedStep(now_s, now_s, tokens, measured)
        return outer

    def begin_part(self, now_s: float) -> None:
        """The work goes on with its next part, which has a time of its own."""
        if self.current is not None:
            longest_s = max(self.current.longest_s, now_s - self.current.part_s)
            self.current = replace(self.current, part_s=now_s, longest_s=longest_s)

    def end(self, now_s: float, outer: WatchedStep | None) -> None:
        """Work has ended, well or not; what it interrupted goes on, and has its whole time again, but says no more
        what a token takes."""
        done = self.current
        if done is not None and done.tokens and done.measured:
            token_s = max(done.longest_s, now_s - done.part_s) / (done.tokens + STEP_TOKENS)
            weight = max(_NEWEST, 1 / (self._measured + 1))
            self._token_s += weight * (token_s - self._token_s)
            self._measured += 1
        self.current = WatchedStep(now_s, now_s, outer.tokens, measured=False) if outer is not None else None

    def clear(self) -> None:
        """The thread is between two pieces of work."""
        self.current = None

    def bound_s(self, tokens: int) -> float:
        """Seconds after which a part of a step of so many tokens is taken for stuck."""
        if self._measured < MEASURED_STEPS:
            return UNMEASURED_S + UNMEASURED_TOKEN_S * tokens
        return STUCK_S + STUCK_FACTOR * self._token_s * (tokens + STEP_TOKENS)

    def check(self) -> float | None:
        """Called each CHECK_S: the seconds for which the thread is at the same part, where these are too many."""
        step = self.current
        if step is None or step is not self._checked:
            self._checked, self._checks = step, 0
            return None
        self._checks += 1
        seconds = self._checks * CHECK_S
        return seconds if seconds > self.bound_s(step.tokens) else None
