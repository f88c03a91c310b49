"""What a worker measures of itself for the router: how long chunks, steps and transfers take.

Times are taken as linear in a few quantities; the factors are found by least squares
with exponential forgetting (Haykin, "Adaptive Filter Theory", ch. 10), so that recent measurements count most.
"""

import threading
from collections.abc import Sequence

import numpy as np

from ..proto.worker_pb2 import PrefillRate, StepRate, WorkerReport

HALF_LIFE = 64  # measurements after which one counts half
MIN_MEASUREMENTS = 3  # measurements before anything is reported
RIDGE = 1e-4  # of the diagonal: keeps factors apart that were only seen together
LINK_BYTES = 64 << 10  # a shorter burst says more of latency than of throughput
MAX_LINKS = 1024
GUESSED_TOKENS_PER_S = 1000.0  # of prompts, until some were computed
_NEWEST = 0.2  # weight of the newest measurement in a running mean


class LinearTime:
    """Milliseconds as a linear function of `quantities` quantities, none of which can save time."""

    def __init__(self, quantities: int) -> None:
        self._moments = np.zeros((quantities, quantities))
        self._products = np.zeros(quantities)
        self._count = 0

    def add(self, quantities: Sequence[float], ms: float) -> None:
        """Counts one measurement."""
        row, keep = np.asarray(quantities, dtype=float), 0.5 ** (1 / HALF_LIFE)
        self._moments = keep * self._moments + np.outer(row, row)
        self._products = keep * self._products + ms * row
        self._count += 1

    def factors(self) -> tuple[float, ...] | None:
        """Milliseconds per unit of each quantity, none negative; None before MIN_MEASUREMENTS."""
        if self._count < MIN_MEASUREMENTS:
            return None
        moments, products = self._moments, self._products
        used = [index for index in range(len(products)) if moments[index, index] > 0]
        found = np.zeros(len(products))
        while used:
            part = moments[np.ix_(used, used)]
            values = np.linalg.solve(part + RIDGE * np.diag(np.diag(part)), products[used])
            if values.min() >= 0:
                found[used] = values
                break
            used.pop(int(values.argmin()))  # noise: without the quantity that would save time
        return tuple(float(value) for value in found)


class Rates:
    """The measurements of one worker. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prefill, self._step = LinearTime(3), LinearTime(3)
        self._links: dict[str, float] = {}  # bytes per ms by address
        self._tokens_per_s = GUESSED_TOKENS_PER_S

    @property
    def tokens_per_s(self) -> float:
        """How fast prompts were computed lately, whatever their lengths and steps."""
        return self._tokens_per_s

    def add_prefill(self, chunks: Sequence[tuple[int, int]], seconds: float) -> None:
        """Prompt tokens [start, end) of some requests were computed in one go."""
        tokens = sum(end - start for start, end in chunks)
        pairs = sum((end - start) * (start + end) / 2 for start, end in chunks)
        with self._lock:
            self._prefill.add((1.0, tokens, pairs / 1e3), seconds * 1e3)
            self._tokens_per_s += _NEWEST * (tokens / seconds - self._tokens_per_s)

    def add_step(self, sequences: int, pages: int, seconds: float) -> None:
        """A batch made one step with that many pages in use."""
        with self._lock:
            self._step.add((1.0, sequences, pages), seconds * 1e3)

    def add_transfer(self, address: str, count: int, seconds: float) -> None:
        """`count` bytes came from one address with nothing but the link to hold them back."""
        if count < LINK_BYTES or seconds <= 0:
            return
        rate = count / (seconds * 1e3)
        with self._lock:
            before = self._links.pop(address, rate)
            self._links[address] = before + _NEWEST * (rate - before)
            if len(self._links) > MAX_LINKS:
                del self._links[next(iter(self._links))]  # the one not heard of for longest

    def fill_report(self, report: WorkerReport) -> None:
        """Adds what was measured."""
        with self._lock:
            prefill, step, links = self._prefill.factors(), self._step.factors(), dict(self._links)
        if prefill is not None:
            report.prefill_rate.CopyFrom(
                PrefillRate(ms=prefill[0], ms_per_token=prefill[1], ms_per_token_ktoken=prefill[2])
            )
        if step is not None:
            report.step_rate.CopyFrom(StepRate(ms=step[0], ms_per_sequence=step[1], ms_per_page=step[2]))
        for address, rate in links.items():
            report.link_bytes_per_ms[address] = rate
