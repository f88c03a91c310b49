"""Answers whose decode worker failed and whose next token has not come yet. Belongs to one event loop."""

import asyncio
import contextlib


class Moving:
    """Counts them, so that what can wait leaves the workers to them."""

    def __init__(self) -> None:
        self._answers: set[str] = set()
        self._none = asyncio.Event()
        self._none.set()

    def begin(self, answer: str) -> None:
        """Its worker failed."""
        self._answers.add(answer)
        self._none.clear()

    def end(self, answer: str) -> None:
        """It goes on elsewhere, or has ended; nothing happens where it never began to move."""
        self._answers.discard(answer)
        if not self._answers:
            self._none.set()

    async def wait_over(self, at_most_s: float) -> bool:
        """Waits until there is none, so many seconds at most; whether there is none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._none.wait()
        return self._none.is_set()
