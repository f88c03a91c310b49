"""Where the KV of running requests lies: the interface of the two pools (`dense.py`, `packed.py`).

Whatever the pool, a request's pages hold the same numbers: the first page, the last full one and the one that fills
are raw, every other page has gone through the request's codec. The packed pool keeps such a page packed; the dense
pool keeps what unpacking it gives, so that a step reads plain rows.

A page is *final* once no later token changes it: full, and first, or packed, or of a codec that packs nothing. Final
pages get their address and are shared: a later request whose prompt starts with the same tokens holds them too, and
they stay after their last holder until their room is needed. The last full page of a prompt is never taken from there
where the codec packs: a transfer would bring it raw, and the final page of the same tokens is packed. The dense pool
keeps a raw copy of it beside (`raw_pages.py`).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ...kvtransfer.page import Section
from ...kvtransfer.receiver import KvReceiver, ReceivedSection
from ...proto.errors import IsthmusError
from ...proto.worker_pb2 import PageCounts
from ..sequences.sequence import Advance, DecodeSequence
from .saved import SavedPages

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


class KvStore(Protocol):
    """Pages of all requests of a decode worker. The engine thread alone uses it.

    A request owns pages from `admit` to `release`; nobody else frees them.
    """

    @property
    def total_pages(self) -> int: ...

    @property
    def in_use(self) -> int:
        """Pages that requests hold."""
        ...

    @property
    def free(self) -> int:
        """Pages that nobody holds, those included that are kept for prompts to come."""
        ...

    def pages_for(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        ...

    def pages_of(self, sequence: DecodeSequence) -> int:
        """How many pages a request holds."""
        ...

    @property
    def used_bytes(self) -> tuple[int, int]:
        """Of pages that requests hold or that are kept, and of raw pages that lie beside them."""
        ...

    def counts(self) -> PageCounts:
        """For reports."""
        ...

    def admit(self, sequence: DecodeSequence, tokens: int, wished_tokens: int) -> bool:
        """Has a request hold what is there of its prompt (`sequence.held` says how much) and pages for the rest.

        In all the pages of `tokens` tokens; False, and nothing is held, where not so many are free. Up to those of
        `wished_tokens`, so that they lie together, where pages are empty.
        """
        ...

    def grow(self, sequence: DecodeSequence, tokens: int) -> bool:
        """Sees to it that a request holds the pages of so many tokens; False where they are not free."""
        ...

    def trim(self, sequence: DecodeSequence, tokens: int) -> bool:
        """Takes back a request's pages beyond those of so many tokens; whether there were any."""
        ...

    @property
    def saved_page_bytes(self) -> int:
        """What a page takes in host memory."""
        ...

    @property
    def saved_extra_pages(self) -> int:
        """How many more pages than it has a saved request takes, at most."""
        ...

    def save(self, sequence: DecodeSequence) -> SavedPages:
        """A copy of a running request's pages in host memory, to the byte; the request keeps the pages."""
        ...

    def saved_bytes(self, sequence: DecodeSequence) -> int:
        """The size of what `save` would return."""
        ...

    def restore(self, sequence: DecodeSequence, saved: SavedPages, tokens: int) -> bool:
        """Has a request hold what was saved of it, and in all the pages of `tokens` tokens; False where not free."""
        ...

    def release(self, sequence: DecodeSequence) -> None:
        """Gives back all pages of a request; harmless where it has none."""
        ...

    def publish(self, sequence: DecodeSequence, stored: int) -> None:
        """Shares those of a request's pages that are final with `stored` tokens, its whole prompt among them."""
        ...

    def seal(self, sequence: DecodeSequence) -> None:
        """Makes all full pages of a request that has come to its end final, and shares them."""
        ...

    def read_held(self, sequence: DecodeSequence, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [held tokens, KV heads, D] of what the request found here."""
        ...

    def receive(self, sequence: DecodeSequence, receiver: KvReceiver, section: ReceivedSection) -> None:
        """Stores a checked section of the prompt. Corrupt where the codec finds that its bytes are not pages."""
        ...

    def put(self, sequence: DecodeSequence, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor) -> None:
        """Stores a section of a prompt that was computed here, in the form that it has in the pool.

        InvalidRequest where a page cannot be packed (a NaN, say).
        """
        ...

    @property
    def rounds_endings(self) -> bool:
        """Whether the end of a prompt, behind all its packed pages, may be computed in it, in one step.

        It then holds the numbers as computed while they are attended to, and those of a transfer afterwards.
        """
        ...

    def begin_step(self, work: Sequence[Advance]) -> Attend:
        """The attention callback of one step: stores the tokens of each request, in order, and attends with them."""
        ...

    def end_step(self, work: Sequence[Advance]) -> list[tuple[DecodeSequence, IsthmusError]]:
        """Packs the pages that the step made old; returns the requests for which that cannot be done (a NaN, say)."""
        ...
