"""Who may fill host memory with encoded pages: each prompt holds its share of the budget before its first page is made.

A share is that of the whole prompt, and is held until its pages are given back: whoever has one comes to its end
without waiting for another's receiver, so that prompts never wait for each other in a circle. Those that wait for their
share go in order of priority, then as they came; one that does not fit keeps those behind it waiting, or it would never
get its share.
"""

import asyncio
import itertools
from dataclasses import dataclass, field

from ..proto.errors import Exhausted


@dataclass(order=True, kw_only=True)
class Share:
    """Of one prompt; `turn` is set once it is held."""

    rank: int  # of its priority: the lowest goes first
    number: int
    nbytes: int = field(compare=False)
    tokens: int = field(compare=False)
    turn: asyncio.Event = field(compare=False, default_factory=asyncio.Event)


class SendBudget:
    """Belongs to one event loop. `ask`, wait for the turn, then `leave`, whatever happened."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._waiting: list[Share] = []
        self._numbers = itertools.count()
        self.held_bytes = 0

    @property
    def waiting(self) -> int:
        """Prompts that wait for their share."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Of these prompts."""
        return sum(share.tokens for share in self._waiting)

    def check(self, nbytes: int) -> None:
        """Exhausted for a prompt that can never have its share: another worker may have more room."""
        if nbytes > self._limit:
            raise Exhausted(
                f"the encoded pages of this prompt take {nbytes / (1 << 20):.1f} MiB, and the send buffer of this "
                f"prefill worker holds {self._limit / (1 << 20):.1f} MiB: raise host_buffer_gib"
            )

    def ask(self, nbytes: int, *, rank: int, tokens: int) -> Share:
        """A place in the queue, which may have its turn at once. `nbytes` has passed `check`."""
        share = Share(rank=rank, number=next(self._numbers), nbytes=nbytes, tokens=tokens)
        self._waiting.append(share)
        self._let_in()
        return share

    def leave(self, share: Share) -> None:
        """Gives a share back, or ends the wait for it."""
        if share.turn.is_set():
            self.held_bytes -= share.nbytes
        else:
            self._waiting.remove(share)
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            first = min(self._waiting)
            if self.held_bytes + first.nbytes > self._limit:
                return
            self._waiting.remove(first)
            self.held_bytes += first.nbytes
            first.turn.set()
