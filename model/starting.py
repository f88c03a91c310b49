"""Work of a worker that starts, done so that those that serve on the same machine feel little of it.

Importing PyTorch and transformers and loading a model takes seconds of a core. Where workers share a machine, those are
taken from the others at the worst moment: one worker is lost, its requests go on with the rest, and it starts again.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

NICENESS = 5  # a third of what a thread at 0 gets of a core that both want; all of it where nobody else does


_phases: dict[str, tuple[float, float]] = {}  # of this process, in order: seconds that passed, seconds of a core
_current = ""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Around a part of a start: how long it takes is in the worker's reports from then on."""
    global _current
    begun_s, used_s, _current = time.perf_counter(), time.process_time(), name
    try:
        yield
    finally:
        _current = ""
        passed, used = _phases.get(name, (0.0, 0.0))
        _phases[name] = passed + time.perf_counter() - begun_s, used + time.process_time() - used_s


def current_phase() -> str:
    """The part of its start that this process is in; "" for none."""
    return _current


def start_counters() -> dict[str, int]:
    """`start_NAME_ms` and `start_NAME_cpu_ms` of each phase; the cores' time is that of all threads of the process."""
    return {
        f"start_{name}{kind}_ms": round(1e3 * seconds)
        for name, both in _phases.items()
        for kind, seconds in zip(("", "_cpu"), both, strict=True)
    }


async def gently(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Runs `work` in a thread of its own that comes last for the processor; what it returns or raises.

    The thread ends with it: no thread that serves is ever slowed (a process cannot take its own niceness back).
    """
    executor = ThreadPoolExecutor(1, "starting", initializer=_stand_back)
    try:
        return await asyncio.wrap_future(executor.submit(work, *args, **kwargs))
    finally:
        executor.shutdown(wait=False)


def _stand_back() -> None:
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.nice(0) + NICENESS))
