"""Who may fill host memory with encoded pages: each prompt reserves room for its own before its first page is made.

A reservation is that of the whole prompt, and lasts until its pages are freed: whoever has one comes to its end without
waiting for another's receiver, so that prompts never wait for each other in a circle. Prompts wait for theirs in order
of priority, then as they came; one that does not fit keeps the later ones waiting, or it would never get its turn.
"""

import asyncio
import itertools
from dataclasses import dataclass, field

from ..proto.errors import Exhausted


@dataclass(order=True, kw_only=True)
class Reservation:
    """Of one prompt; `granted` is set once it may fill its bytes."""

    rank: int  # of its priority: the lowest goes first
    number: int
    nbytes: int = field(compare=False)
    tokens: int = field(compare=False)
    granted: asyncio.Event = field(compare=False, default_factory=asyncio.Event)


class SendBudget:
    """Belongs to one event loop. `reserve`, wait until it is granted, then `end`, whatever happened."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._waiting: list[Reservation] = []
        self._numbers = itertools.count()
        self.reserved_bytes = 0

    @property
    def waiting(self) -> int:
        """Prompts whose reservation is not granted yet."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Of these prompts."""
        return sum(reservation.tokens for reservation in self._waiting)

    def check(self, nbytes: int) -> None:
        """Exhausted for a prompt that can never be granted its bytes: another worker may have more room."""
        if nbytes > self._limit:
            raise Exhausted(
                f"the encoded pages of this prompt take {nbytes / (1 << 20):.1f} MiB, and the send buffer of this "
                f"prefill worker holds {self._limit / (1 << 20):.1f} MiB: raise host_buffer_gib"
            )

    def reserve(self, nbytes: int, *, rank: int, tokens: int) -> Reservation:
        """A place in the queue, which may be granted at once. `nbytes` has passed `check`."""
        reservation = Reservation(rank=rank, number=next(self._numbers), nbytes=nbytes, tokens=tokens)
        self._waiting.append(reservation)
        self._grant()
        return reservation

    def end(self, reservation: Reservation) -> None:
        """Frees the bytes of a reservation, or ends the wait for it."""
        if reservation.granted.is_set():
            self.reserved_bytes -= reservation.nbytes
        else:
            self._waiting.remove(reservation)
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            first = min(self._waiting)
            if self.reserved_bytes + first.nbytes > self._limit:
                return
            self._waiting.remove(first)
            self.reserved_bytes += first.nbytes
            first.granted.set()
