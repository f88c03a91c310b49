"""How long an event loop stands still."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class Gaps:
    """`largest_s`: the longest time in which the loop ran nothing else, so far."""

    largest_s: float = 0.0


@asynccontextmanager
async def watched_loop() -> AsyncIterator[Gaps]:
    """Measures the loop of the caller with a task that wakes every 2 ms."""
    gaps = Gaps()

    async def tick() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.002)
            now = time.monotonic()
            gaps.largest_s, last = max(gaps.largest_s, now - last), now

    task = asyncio.create_task(tick())
    try:
        yield gaps
        await asyncio.sleep(0.005)  # a gap that has just ended
    finally:
        task.cancel()
