"""How far a calibration in this process is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_share: float | None = None


@contextmanager
def noted() -> Iterator[Callable[[int, int], None]]:
    """Around a calibration: `progress(done, of)`."""
    global _share

    def progress(done: int, of: int) -> None:
        global _share
        _share = done / of

    _share = 0.0
    try:
        yield progress
    finally:
        _share = None


def calibrated_share() -> float | None:
    """The share that is done of the calibration that runs; None where none does. From any thread."""
    return _share
