"""The engine thread: the one thread of a worker that touches the model, the pool and the device."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from ..kernels.cpu.compiled import is_compiling
from ..proto.errors import Exhausted
from .watchdog import CHECK_S, Watchdog

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # how allocators of torch put it


class StuckError(Exception):
    """A step has taken longer than any step should."""


class EngineThread:
    """Runs posted calls and steps in turn until stopped.

    `step` does one piece of work and returns whether there was any; with none the thread sleeps until the next
    post. An exception that leaves a step or a posted call is a bug: `on_failure` is called, and the thread makes no
    more steps. It still runs what is posted, so that whoever posts gets an answer too and everything is freed.

    A second thread checks that the first one goes on. One that is stuck fails in the same way, and `on_failure` is
    called from the second thread; the first one cannot be ended but with its process.
    """

    def __init__(self, name: str, step: Callable[[], bool], on_failure: Callable[[BaseException], None]) -> None:
        self._step, self._on_failure = step, on_failure
        self._inbox: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._stopping = threading.Event()
        self._failing = threading.Lock()
        self._failed = False
        self._watchdog = Watchdog()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._checker = threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._checker.start()

    def post(self, call: Callable[[], object]) -> None:
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
        outer = self._watchdog.begin(time.monotonic(), tokens, measured=measured)
        try:
            yield
        finally:
            self._watchdog.end(time.monotonic(), outer)

    def begin_part(self) -> None:
        """Called between parts of what is computed, in the engine thread: each may take its own time (`Watchdog`)."""
        self._watchdog.begin_part(time.monotonic())

    @property
    def step_s(self) -> float:
        """For how long the piece of work has gone on that the thread is at; 0 where it sleeps."""
        step = self._watchdog.current
        return time.monotonic() - step.began_s if step is not None else 0.0

    def _run(self) -> None:
        busy = False
        while True:
            self._watchdog.clear()
            with self._wake:
                while not (busy or self._inbox or self._stopping.is_set()):
                    self._wake.wait()
                calls, self._inbox = self._inbox, deque()
                if self._stopping.is_set() and not calls:
                    return
            self._watchdog.begin(time.monotonic(), 0)
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
                    log.exception("the failure of the engine thread could not be passed on")

    def _watch(self) -> None:
        while not self._stopping.wait(CHECK_S) and not self._failed:
            stuck_s = None if is_compiling() else self._watchdog.check()
            if stuck_s is not None:
                log.critical("the engine thread is stuck in a step for %.1f s", stuck_s)
                self._fail(StuckError(f"stuck in a step for {stuck_s:.1f} s"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller piece of the same work might have found the memory that it needs."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def no_memory(error: Exception, what: str) -> Exhausted:
    """The error of one request for which there was none; raises any other error."""
    if not is_out_of_memory(error):
        raise error
    return Exhausted(f"no memory here for this {what}")
