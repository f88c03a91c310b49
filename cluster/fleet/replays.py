"""Answers whose decode worker failed and whose next token has not come yet. Belongs to one event loop."""

import asyncio
import contextlib


class InFlightReplays:
    """Counts them, so that canaries leave the workers to them."""

    def __init__(self) -> None:
        self._answers: set[str] = set()
        self._none = asyncio.Event()
        self._none.set()

    def begin(self, answer: str) -> None:
        """The answer's worker failed."""
        self._answers.add(answer)
        self._none.clear()

    def end(self, answer: str) -> None:
        """The answer goes on elsewhere, or has ended; nothing happens where it is not replayed."""
        self._answers.discard(answer)
        if not self._answers:
            self._none.set()

    async def wait_none(self, at_most_s: float) -> bool:
        """Waits until there is none, so many seconds at most; whether there is none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._none.wait()
        return self._none.is_set()
