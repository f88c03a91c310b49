"""The engine thread: the one thread of a worker that touches the model, the pool and the device."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from ..kernels.cpu.compiled import is_compiling
from .stamps import LOOK_S, Stamps

log = logging.getLogger(__name__)


class StuckError(Exception):
    """A step has taken longer than any honest one would."""


class EngineThread:
    """Runs posted calls and steps in turn until stopped.

    `step` does one piece of work and returns whether there was any; with none the thread sleeps until the next
    post. An exception that leaves a step or a posted call is a bug: `on_failure` is told, and the thread makes no
    more steps. It still runs what is posted, so that whoever posts can be told too and nothing stays held.

    A second thread looks at whether the first one goes on. One that is stuck fails in the same way, and `on_failure`
    is told from the second thread; the first one cannot be ended but with its process.
    """

    def __init__(self, name: str, step: Callable[[], bool], on_failure: Callable[[BaseException], None]) -> None:
        self._step, self._on_failure = step, on_failure
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = threading.Event()
        self._failing = threading.Lock()
        self._failed = False
        self.stamps = Stamps()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._watcher = threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._watcher.start()

    def post(self, call: Callable[[], None]) -> None:
        """Has the engine run `call` before its next step. From any thread; calls run in the order posted."""
        with self._wake:
            self._inbox.append(call)
            self._wake.notify()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step it is in; what is posted by then still runs."""
        with self._wake:
            self._stopping.set()
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @contextlib.contextmanager
    def computing(self, tokens: int, *, measured: bool = True) -> Iterator[None]:
        """Around what computes so many tokens, in the engine thread: it may take the longer, the more they are.

        `measured=False`: it moves or decodes their KV, and says nothing of what a token takes to compute.
        """
        outer = self.stamps.begin(time.monotonic(), tokens, measured=measured)
        try:
            yield
        finally:
            self.stamps.end(time.monotonic(), outer)

    def reach_part(self) -> None:
        """Called between parts of what is computed, in the engine thread: each may take its own time (`Stamps`)."""
        self.stamps.reach(time.monotonic())

    @property
    def step_s(self) -> float:
        """For how long the piece of work has gone on that the thread is at; 0 where it sleeps."""
        stamp = self.stamps.current
        return time.monotonic() - stamp.began_s if stamp is not None else 0.0

    def _run(self) -> None:
        busy = False
        while True:
            self.stamps.clear()
            with self._wake:
                while not (busy or self._inbox or self._stopping.is_set()):
                    self._wake.wait()
                calls, self._inbox = self._inbox, deque()
                if self._stopping.is_set() and not calls:
                    return
            self.stamps.begin(time.monotonic(), 0)
            try:
                while calls:
                    calls.popleft()()
                busy = not self._failed and self._step()
            except BaseException as error:
                log.exception("the engine thread failed")
                busy = False
                with self._wake:
                    self._inbox.extendleft(reversed(calls))
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._failing:
            first, self._failed = not self._failed, True
            if first:
                try:
                    self._on_failure(error)
                except Exception:
                    log.exception("nobody was told that the engine thread failed")

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S) and not self._failed:
            stuck_s = None if is_compiling() else self.stamps.look()
            if stuck_s is not None:
                log.critical("the engine thread is stuck in a step for %.1f s", stuck_s)
                self._fail(StuckError(f"stuck in a step for {stuck_s:.1f} s"))
