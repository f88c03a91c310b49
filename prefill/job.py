"""One prompt on its way through a prefill worker."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..kvtransfer.encoded import EncodedPage, PageFormat, PageKey
from ..kvtransfer.frame import PACKED
from ..kvtransfer.hashing import hash_of_page
from ..kvtransfer.page import Section, packed_range
from ..kvtransfer.pool.allocator import Run
from ..kvtransfer.pool.table import runs_of
from ..kvtransfer.sender import KvSender
from ..model.prompt_logprobs import ScoredTokens
from ..model.sampling import SampledToken
from ..proto.common_pb2 import TransferStats
from ..proto.errors import IsthmusError
from ..proto.priority import STANDARD_RANK
from ..proto.sampling import Sampling
from ..worker.step_plan import SequenceId, SequencePages
from .outbox import Outbox

NO_PAGES = SequencePages((), "")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a request asks for, and where its pages are to be found."""

    token_ids: list[int]
    form: PageFormat
    page_hashes: bytes  # of all full pages
    tenant: str = ""
    is_shared: bool = True  # other requests may find its pages; else only this one, where it is replayed, and in memory
    receiver_pages: int = 0  # from the start, that the receiver holds already
    is_scored: bool = False  # its own tokens' log-probabilities are asked for

    @property
    def reusable_pages(self) -> int:
        """Full pages that need not be computed if they are there: the last token always is, for its logits, and all
        are where the prompt is scored."""
        return 0 if self.is_scored else (len(self.token_ids) - 1) // self.form.page_tokens

    def page_hash(self, page: int) -> bytes:
        return hash_of_page(self.page_hashes, page)

    @property
    def encoded_bytes(self) -> int:
        """What its pages take in the form in which they are sent, those included that the receiver holds."""
        size, tokens = self.form.page_tokens, len(self.token_ids)
        low, high = packed_range(tokens, size, self.form.codec.packs)
        packed = (high - low) // size * sum(self.form.sizes(PACKED, size)) if low < high else 0
        return packed + sum(self.form.sizes(self.form.raw_encoding, tokens - (high - low)))

    def key(self, page: int) -> PageKey:
        """The form in which this prompt sends a full page."""
        low, high = packed_range(len(self.token_ids), self.form.page_tokens, self.form.codec.packs)
        return self.form.key(self.page_hash(page), packed=low <= page * self.form.page_tokens < high)

    def usable_keys(self, page: int) -> list[PageKey]:
        """The encoded forms of a full page from which this prompt can go on, the best first.

        What leaves packed can be packed from its raw form; what leaves raw is never made from packed bytes. A page
        that the receiver holds does not leave.
        """
        raw, packed = (self.form.key(self.page_hash(page), packed=packed) for packed in (False, True))
        if not self.form.codec.packs:
            return [raw]
        if page < self.receiver_pages:
            return [raw, packed]
        return [packed, raw] if self.key(page) == packed else [raw]


@dataclass(eq=False, kw_only=True)
class PrefillJob:
    """A request as the engine sees it. The engine thread alone changes it, but for the outbox."""

    id: SequenceId
    worker: str  # that computes it, for the statistics
    attempt: int
    prompt: Prompt
    sampling: Sampling
    sender: KvSender
    outbox: Outbox
    rank: int = STANDARD_RANK
    deadline_s: float | None = None  # by the clock of `time.monotonic`
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None  # when it got its pages
    pages: SequencePages = NO_PAGES  # of the pool, from its start to the first token
    runs: tuple[Run, ...] = ()  # the same as runs
    pinned: list[EncodedPage] = field(default_factory=list)  # of the host cache, until the call ends
    fetched: frozenset[bytes] = frozenset()  # hashes of pages that came from the store for this request
    cached_tokens: int = 0  # sent and not computed: the pages were here,
    stored_tokens: int = 0  # or in the store
    forks: int = 0  # answers that follow with the seeds after its own, and have the first token drawn too
    alone: bool = False  # in steps of its own: an engine died that computed it
    due: list[Section] | None = None  # sections of the chunk in work,
    layers_sent: int = 0  # and how many layers of these are in the outbox already
    drawn_for_forks: tuple[SampledToken, ...] = ()
    scored: ScoredTokens | None = None  # log-probabilities that the chunk in work has made
    failure: IsthmusError | None = None  # its KV cannot be sent (a NaN, say)

    @property
    def token_ids(self) -> list[int]:
        return self.prompt.token_ids

    def set_pages(self, slots: Sequence[int]) -> None:
        """Notes its pages of the pool."""
        self.pages = SequencePages(tuple(slots), self.prompt.form.codec.name) if slots else NO_PAGES
        self.runs = runs_of(slots)

    def begin_chunk(self, end: int) -> list[Section]:
        """The sections that leave with the chunk that ends there; the same ones where it is computed once more."""
        if self.due is None:
            self.due, self.layers_sent = self.sender.advance(end), 0
        return self.due

    def stats(self, *, sampled_unix_ns: int, sampled_s: float, written_before: int) -> TransferStats:
        """What the transfer cost, but for what is known only when all frames are made."""
        started = self.started_s or sampled_s
        return TransferStats(
            kv_bytes_bf16=self.sender.bf16_bytes,
            kv_bytes_before_prefill_end=written_before,
            queue_ms=(started - self.arrived_s) * 1e3,
            prefill_ms=(sampled_s - started) * 1e3,
            first_token_unix_ns=sampled_unix_ns,
            prefill_worker=self.worker,
            attempt=self.attempt,
            held_tokens=self.prompt.receiver_pages * self.prompt.form.page_tokens,
            cached_tokens=self.cached_tokens,
            stored_tokens=self.stored_tokens,
        )
