import asyncio
import os
import sys

import pytest

from isthmus.worker.start import NICENESS, gently


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
