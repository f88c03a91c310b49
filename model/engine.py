"""The engine thread: the one thread of a worker that touches the model, the pool and the device."""

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)


class EngineThread:
    """Runs posted calls and steps in turn until stopped.

    `step` does one piece of work and returns whether there was any; with none the thread sleeps until the next
    post. An exception that leaves a step or a posted call is a bug: `on_failure` is told, and the thread makes no
    more steps. It still runs what is posted, so that whoever posts can be told too and nothing stays held.
    """

    def __init__(self, name: str, step: Callable[[], bool], on_failure: Callable[[BaseException], None]) -> None:
        self._step, self._on_failure = step, on_failure
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Has the engine run `call` before its next step. From any thread; calls run in the order posted."""
        with self._wake:
            self._inbox.append(call)
            self._wake.notify()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step it is in; what is posted by then still runs."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        busy = failed = False
        while True:
            with self._wake:
                while not (busy or self._inbox or self._stopping):
                    self._wake.wait()
                calls, self._inbox = self._inbox, deque()
                if self._stopping and not calls:
                    return
            try:
                while calls:
                    calls.popleft()()
                busy = not failed and self._step()
            except BaseException as error:
                log.exception("the engine thread failed")
                busy, failed = False, True
                with self._wake:
                    self._inbox.extendleft(reversed(calls))
                try:
                    self._on_failure(error)
                except Exception:
                    log.exception("nobody was told that the engine thread failed")
