"""Active requests, and how long one takes: what draining and retry hints go by."""

import asyncio
import contextlib
import time
from collections.abc import Iterator


class Load:
    """The requests of one gateway. Belongs to one event loop."""

    def __init__(self) -> None:
        self.active = 0
        self._mean_s = 1.0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """Counts one request for as long as the block runs."""
        start_s = time.monotonic()
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            self._mean_s += 0.1 * (time.monotonic() - start_s - self._mean_s)
            if not self.active:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Waits until no request is active."""
        await self._idle.wait()

    def retry_after_s(self) -> float:
        """About when the next request ends and makes room: 100 ms to 10 s."""
        return min(10.0, max(0.1, self._mean_s / max(1, self.active)))
