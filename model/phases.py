"""The phases of a worker's start: what it is at, and how long each took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
