import asyncio
import os
import sys
import time

import pytest

from isthmus.model import starting
from isthmus.model.starting import NICENESS, gently


def niceness() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
async def test_a_start_comes_last_for_the_processor_and_nothing_else_does() -> None:
    before = niceness()
    assert await gently(niceness) == min(19, before + NICENESS)
    assert (niceness(), await asyncio.to_thread(niceness)) == (before, before)


async def test_what_a_start_raises_is_raised() -> None:
    assert await gently(int, "ff", base=16) == 255
    with pytest.raises(ValueError, match="invalid literal"):
        await gently(int, "x")


def test_the_phases_of_a_start_are_counted_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_phases", {})
    for _ in range(2):
        with starting.phase("load"):
            time.sleep(0.02)
    counters = starting.start_counters()
    assert list(counters) == ["start_load_ms", "start_load_cpu_ms"]
    assert counters["start_load_ms"] >= 40 > counters["start_load_cpu_ms"]
