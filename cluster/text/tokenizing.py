"""Tokenization off the event loop: in a few threads, the long texts in threads of their own.

A tokenization cannot be stopped. One whose request is cancelled while it waits is never begun, and one that runs keeps
its thread until it is done: so there is a bound on how many run, and short texts never wait behind long ones.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ...proto.errors import Exhausted

LONG = 64 << 10  # bytes; a text below takes some tens of milliseconds
MAX_WAITING = 64  # long texts, running ones included

_short = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
_long = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), thread_name_prefix="tokenize-long")


class TokenizerThreads:
    """Runs the tokenizations of one gateway."""

    def __init__(self) -> None:
        self._waiting = 0  # long ones

    async def run(self, size: int, tokenize: Callable[[], list[int]]) -> list[int]:
        """What `tokenize` returns or raises, for a text of `size` bytes; Exhausted where too many long ones wait."""
        loop = asyncio.get_running_loop()
        if size < LONG:
            return await loop.run_in_executor(_short, tokenize)
        if self._waiting >= MAX_WAITING:
            raise Exhausted(f"{self._waiting} long prompts wait to be tokenized")
        self._waiting += 1
        try:
            return await loop.run_in_executor(_long, tokenize)
        finally:
            self._waiting -= 1
