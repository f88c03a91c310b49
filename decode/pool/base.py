"""Where the KV of running requests lies: the interface of the two KV pools (`dense.py`, `packed.py`).

Whatever the pool, a request's pages hold the same numbers: the first page, the last full one and the one that fills
are raw, every other page has gone through the request's codec. The packed pool keeps such a page packed; the dense
pool keeps what unpacking it gives, so that a step reads plain rows.

A page is *final* once no later token changes it: full, and first, or packed, or of a codec that packs nothing. Final
pages get their address and are shared: a later request whose prompt starts with the same tokens holds them too, and
they stay after their last holder until their room is needed. The last full page of a prompt is never taken from there
where the codec packs: a transfer would bring it raw, and the final page of the same tokens is packed. The dense pool
keeps a raw copy of it beside (`raw_copies.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...kvtransfer.codecs.registry import PageCodec
from ...kvtransfer.page import Section, packed_range
from ...kvtransfer.receiver import KvReceiver, ReceivedSection
from ...model.attention import Attend
from ...proto.errors import IsthmusError
from ...proto.worker_pb2 import PageCounts
from ...worker.step_plan import SequenceId, SequencePages, StepBatch


class PooledSequence(Protocol):
    """What a pool asks of a request."""

    id: SequenceId
    codec: PageCodec
    cached_tokens: int  # of its prompt, found in the pool; set by `allocate`
    computed: int  # tokens whose KV is in the pool

    @property
    def prompt_tokens(self) -> int: ...

    def page_addresses(self, pages: int, page_tokens: int) -> list[bytes]:
        """Of the first pages, which hold known tokens; none where it shares none."""
        ...

    def reusable_addresses(self, page_tokens: int) -> list[bytes]:
        """Of the pages of its prompt that it may take from others."""
        ...

    def raw_copy_address(self, page_tokens: int, cached_pages: int) -> bytes | None:
        """Of the page whose raw copy it may take, after so many pages of others."""
        ...


@dataclass(frozen=True)
class SavedPages:
    """Exact copies of a preempted request's pages in host memory; the pool that made them knows what each tensor is."""

    packed: tuple[int, int]  # pages [from, to) are packed, all others raw
    layers: tuple[tuple[Tensor, ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


class KvPool(Protocol):
    """The pages of all requests of a decode worker, and who holds them. The engine thread alone uses it.

    A request owns pages from `allocate` or `restore` to `free`; nobody else frees them. What a step does to the pool
    goes by the slots in its batch alone (`attend_step`, `read_prefix`, `write_section`).
    """

    page_tokens: int

    @property
    def total_pages(self) -> int: ...

    @property
    def in_use(self) -> int:
        """Pages that requests hold."""
        ...

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds, those included that are kept for prompts to come."""
        ...

    def pages_for(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        ...

    def pages_of(self, sequence: PooledSequence) -> int:
        """How many pages a request holds."""
        ...

    @property
    def used_bytes(self) -> tuple[int, int]:
        """Of pages that requests hold or that are kept, and of raw pages that lie beside them."""
        ...

    def counts(self) -> PageCounts:
        """For reports."""
        ...

    def allocate(self, sequence: PooledSequence, tokens: int, preferred_tokens: int) -> bool:
        """Gives a request the pages that are there of its prompt (`sequence.cached_tokens` says how much they hold) and
        pages for the rest.

        In all the pages of `tokens` tokens; False, and it gets nothing, where not so many are free. Up to those of
        `preferred_tokens`, so that they lie together, where pages are empty.
        """
        ...

    def extend(self, sequence: PooledSequence, tokens: int) -> bool:
        """Gives a request the pages that it lacks for so many tokens; False where they are not free."""
        ...

    def trim(self, sequence: PooledSequence, tokens: int) -> bool:
        """Frees a request's pages beyond those of so many tokens; whether there were any."""
        ...

    def free(self, sequence: PooledSequence) -> None:
        """Frees all pages of a request; harmless where it has none."""
        ...

    @property
    def saved_page_bytes(self) -> int:
        """What a page takes in host memory."""
        ...

    @property
    def saved_extra_pages(self) -> int:
        """How many more pages than it has a saved request takes, at most."""
        ...

    def save(self, sequence: PooledSequence) -> SavedPages:
        """A copy of a running request's pages in host memory, to the byte; the request keeps the pages."""
        ...

    def saved_bytes(self, sequence: PooledSequence) -> int:
        """The size of what `save` would return."""
        ...

    def restore(self, sequence: PooledSequence, saved: SavedPages, tokens: int) -> bool:
        """Gives a request the pages of `tokens` tokens, with what was saved of it; False where they are not free."""
        ...

    def publish(self, sequence: PooledSequence, stored: int) -> None:
        """Shares those of a request's pages that are final with `stored` tokens, its whole prompt among them."""
        ...

    def finalize(self, sequence: PooledSequence) -> None:
        """Makes all full pages of a request that has come to its end final, and shares them."""
        ...

    def receive(self, sequence: PooledSequence, receiver: KvReceiver, section: ReceivedSection) -> None:
        """Stores a checked section of the prompt. Corrupt where the codec finds that its bytes are not pages."""
        ...

    def step_pages(self, sequence: PooledSequence, end: int) -> SequencePages:
        """A request's pages for a step that stores its tokens up to `end`, for which it holds pages."""
        ...

    def codec(self, pages: SequencePages) -> PageCodec: ...

    def read_prefix(self, pages: SequencePages, tokens: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, KV heads, D] of the first tokens, whole pages, of a sequence."""
        ...

    def read_raw(self, pages: SequencePages, start: int, end: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, KV heads, D] of tokens in raw pages; `start` is the first of a page."""
        ...

    def write_section(
        self, pages: SequencePages, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor
    ) -> None:
        """Stores a section of a prompt that was computed here, in the form that it has in the pool.

        InvalidRequest where a page cannot be packed (a NaN, say).
        """
        ...

    @property
    def rounds_endings(self) -> bool:
        """Whether the end of a prompt, after all its packed pages, may be computed in it, in one step.

        It then holds the numbers as computed while they are attended to, and those of a transfer afterwards.
        """
        ...

    def attend_step(self, batch: StepBatch) -> Attend:
        """The attention callback of one step: stores the tokens of each sequence, in order, and attends with them."""
        ...

    def finish_step(self, stored: Sequence[tuple[PooledSequence, int]]) -> list[tuple[PooledSequence, IsthmusError]]:
        """Packs the pages that the step made old, and shares the final ones.

        `stored`: its sequences, with the tokens that each has KV of now. Returns those for which it cannot be done (a
        NaN, say).
        """
        ...


def reusable_tokens(prompt_tokens: int, page_tokens: int, packs: bool) -> int:
    """How many tokens of a prompt may come from final pages: whole ones, and one token at least is computed."""
    pages = (prompt_tokens - 1) // page_tokens
    if packs:  # the last full page is to be raw, as only the first one is where it is final
        pages = min(pages, max(1, prompt_tokens // page_tokens - 1))
    return pages * page_tokens


def final_pages(stored: int, page_tokens: int, packs: bool) -> int:
    """How many pages of a sequence of `stored` tokens are final: where the codec packs, the newest full one is not."""
    full = stored // page_tokens
    return max(min(full, 1), full - 1) if packs else full


def page_to_pack(stored: int, prompt_tokens: int, page_tokens: int, packs: bool) -> int | None:
    """The page that is neither first nor newest any more once `stored` tokens are stored, if there is one.

    Those of the prompt were packed when it was complete.
    """
    if stored % page_tokens or stored <= prompt_tokens:
        return None
    start, end = packed_range(stored, page_tokens, packs)
    return end // page_tokens - 1 if start < end else None


def completes_page(stored: int, prompt_tokens: int, page_tokens: int) -> bool:
    """Whether pages may be final with `stored` tokens that were not before: those of a prompt only with its end."""
    return stored == prompt_tokens or (stored > prompt_tokens and stored % page_tokens == 0)
