"""What every benchmark prints and writes: what it is at, line by line on stderr; figures as JSON, also of a run that
was stopped, with `"complete": false`."""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import numpy as np

T = TypeVar("T")

SAY_EVERY_S = 2.0
_BEGUN_S = time.monotonic()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99, rounded to hundredths."""
    return {name: round(float(np.percentile(values, rank)), 2) for name, rank in (("p50", 50), ("p99", 99))}


def conditions(**own: Any) -> dict[str, Any]:
    """When and on what a benchmark ran."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        **own,
    }


def say(text: str) -> None:
    """One line on stderr, with the seconds since the benchmark began; the same with a terminal and without."""
    print(f"[{time.monotonic() - _BEGUN_S:6.1f} s] {text}", file=sys.stderr, flush=True)


class Count:
    """How far work of many steps is: a line at its start and its end, and every SAY_EVERY_S when something was done."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._said_s = time.monotonic()
        say(f"{what}: {total} to do")

    def advance(self, steps: int = 1) -> None:
        """So many more are done."""
        self.reach(self._done + steps)

    def reach(self, done: int) -> None:
        """So many are done in all."""
        ends = done >= self._total > self._done
        self._done = done
        if ends or time.monotonic() - self._said_s >= SAY_EVERY_S:
            say(f"{self._what}: {done} of {self._total} done")
            self._said_s = time.monotonic()


def each(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, counted."""
    count = Count(what, len(items))
    for item in items:
        yield item
        count.advance()


class Report:
    """The JSON of a run. It is written whenever a figure comes, and once more at the end, when it is printed too.

    The file says `"complete": false` until the `with` block ends well. SIGINT and SIGTERM end the block at once, in the
    middle of a computation too: what the benchmark started is stopped, the figures so far are kept, and the process
    exits with 128 and the signal's number.
    """

    def __init__(self, path: Path | None) -> None:
        self.figures: dict[str, Any] = {}
        self._path = path
        self._signal: int = signal.SIGINT
        self._complete = False

    def put(self, **figures: Any) -> None:
        """Adds figures, or replaces those of the same names."""
        self.figures |= figures
        self._write()

    def append(self, name: str, row: Any) -> None:
        """Adds a row to the list of that name."""
        self.figures.setdefault(name, []).append(row)
        self._write()

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._complete = kind is None
        self._write()
        if kind is None or issubclass(kind, KeyboardInterrupt):
            print(self._text(), flush=True)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            say("stopped: these are the figures so far")
            raise SystemExit(128 + self._signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        raise KeyboardInterrupt

    def _write(self) -> None:
        if self._path is not None:
            fresh = self._path.with_name(f"{self._path.name}.part")
            fresh.write_text(self._text() + "\n")
            fresh.replace(self._path)

    def _text(self) -> str:
        return json.dumps({"complete": self._complete, **self.figures}, indent=2)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "")
    native = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return f"{name} ({', '.join(native)})"
