"""What arrives for requests between two steps: received KV that is still encoded, and requests that can start.

The event loop fills the inbox up to a bound of bytes, above which transfers pause; the engine thread empties it.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..kvtransfer.receiver import KvReceiver, ReceivedSection
from ..model.sampling import SampledToken
from .sequence import DecodeSequence


@dataclass(frozen=True)
class ReceivedKv:
    """A checked section of a prompt's KV, still encoded."""

    sequence: DecodeSequence
    receiver: KvReceiver
    section: ReceivedSection

    @property
    def nbytes(self) -> int:
        return len(self.section.data)


@dataclass(frozen=True)
class Start:
    """The request joins the batch; what of its prompt is to come from others has arrived before this.

    `drawn`: its first token, where that was drawn elsewhere and is part of its output from now on.
    """

    sequence: DecodeSequence
    computed: int
    drawn: int | None
    for_forks: tuple[SampledToken, ...] = ()  # first tokens of the answers that follow


class Inbox:
    """Made in the event loop that fills it. `nbytes`, `wait_for_room` and `count` are for that loop's thread alone,
    `add` and `take` for the engine thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._loop = asyncio.get_running_loop()
        self._arrivals: deque[ReceivedKv | Start] = deque()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_closed = False
        self.nbytes = 0  # received and not decoded

    async def wait_for_room(self) -> None:
        """Returns once less than the bound waits to be decoded, or the inbox is closed."""
        while self.nbytes >= self._limit and not self._is_closed:  # one of those that wait may have filled it
            await self._has_room.wait()

    def count(self, nbytes: int) -> None:
        """Counts bytes that were received, or (negative) decoded."""
        self.nbytes += nbytes
        if self.nbytes < self._limit or self._is_closed:
            self._has_room.set()
        else:
            self._has_room.clear()

    def add(self, arrivals: Iterable[ReceivedKv | Start]) -> None:
        """Queues what has arrived."""
        self._arrivals.extend(arrivals)

    def take(self) -> ReceivedKv | Start | None:
        """The next arrival; what it holds counts until `count_decoded`."""
        return self._arrivals.popleft() if self._arrivals else None

    def count_decoded(self, nbytes: int) -> None:
        """Makes room for as many bytes. From any thread."""
        self._loop.call_soon_threadsafe(self.count, -nbytes)

    def close(self) -> None:
        """Nothing waits for room any more. From any thread."""
        self._is_closed = True
        self._loop.call_soon_threadsafe(self._has_room.set)
