"""One request on its way through a decode worker."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from ..kvtransfer.codecs.registry import PageCodec
from ..kvtransfer.frame import MAX_SCORED_TOKENS
from ..kvtransfer.hashing import PageAddresses
from ..model.penalties import SeenTokens, penalises
from ..model.prompt_logprobs import ScoredTokens
from ..model.sampling import SampledToken, SampleRow
from ..proto.common_pb2 import FinishReason, TokenLogprobs
from ..proto.decode_pb2 import DecodeEvent
from ..proto.errors import InvalidRequest, IsthmusError
from ..proto.priority import STANDARD_RANK
from ..proto.sampling import Sampling
from ..worker.step_plan import SequenceId
from .pool.base import reusable_tokens
from .pool.forks import Fork


@dataclass(frozen=True)
class Token:
    """One drawn token; `finish` is set where it is the last one."""

    id: int
    logprobs: TokenLogprobs | None
    finish: FinishReason.ValueType | None

    def to_pb(self) -> DecodeEvent:
        event = DecodeEvent(token_ids=[self.id])
        if self.logprobs is not None:
            event.logprobs.append(self.logprobs)
        if self.finish is not None:
            event.finish_reason = self.finish
        return event


class TokenStream:
    """Tokens on their way from the engine to the request's handler. The event loop's thread alone uses it."""

    def __init__(self) -> None:
        self._items: deque[Token | ScoredTokens | IsthmusError] = deque()
        self._filled = asyncio.Event()
        self._has_pages = asyncio.Event()  # or an error

    def put(self, item: Token | ScoredTokens | IsthmusError) -> None:
        self._items.append(item)
        self._filled.set()
        self._has_pages.set()

    def mark_allocated(self) -> None:
        """The request holds its pages now."""
        self._has_pages.set()

    async def wait_for_pages(self) -> None:
        """Returns once the request holds its pages; raises the error that ended it before."""
        await self._has_pages.wait()
        if self._items and isinstance(self._items[0], IsthmusError):
            raise self._items[0]

    async def get(self) -> Token | ScoredTokens:
        """The next token, or log-probabilities of a prompt that is computed here; raises the error that ended the
        request."""
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        item = self._items.popleft()
        if isinstance(item, IsthmusError):
            raise item
        return item


class PromptReport:
    """Passes the log-probabilities of a prompt on to the gateway: each once, in order, however many compute it,
    one after the other."""

    def __init__(self, write: Callable[[DecodeEvent], Awaitable[None]]) -> None:
        self._write = write
        self._told = 0  # tokens of the prompt, from its second on

    async def pass_on(self, first: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Those of the tokens from position `first` on, which is at most one after those that were told."""
        fresh = logprobs[max(0, self._told - (first - 1)) :]
        for at in range(0, len(fresh), MAX_SCORED_TOKENS):
            part = fresh[at : at + MAX_SCORED_TOKENS]
            self._told += len(part)
            await self._write(DecodeEvent(prompt_logprobs=part))


@dataclass
class LocalTiming:
    """When this worker computed a prompt; the engine thread sets it before it hands out the first token."""

    began_s: float = 0.0  # monotonic, of the first chunk
    sampled_s: float = 0.0  # monotonic, of the first token
    sampled_unix_ns: int = 0


@dataclass(eq=False)
class DecodeSequence:
    """A request as the engine sees it. The engine thread alone changes it, but for the stream."""

    id: SequenceId
    prompt: list[int]
    sampling: Sampling
    codec: PageCodec
    stream: TokenStream
    output: list[int] = field(default_factory=list)  # at first: what a lost decode worker has emitted
    rank: int = STANDARD_RANK  # of its priority
    addresses: PageAddresses | None = None  # of its full pages; None: it shares none
    cached_tokens: int = 0  # of the prompt, whole pages: they were in the pool when it got its pages
    computed: int = 0  # tokens whose KV is in the pool
    seen: SeenTokens | None = None  # where its options penalise tokens, from its first step here
    timing: LocalTiming = field(default_factory=LocalTiming)
    arrived_s: float = field(default_factory=time.monotonic)
    dropped: bool = False  # its call has ended
    alone: bool = False  # in steps of its own: an engine died that computed it
    request_id: str = ""
    forks: int = 0  # answers that follow, and begin with what is kept of its prompt
    fork_of: str = ""  # id of the request that this one follows
    fork: Fork | None = None  # what is kept of that one, until this one has its pages
    first: SampledToken | None = None  # of that: with it the output begins, and the prompt's KV is here

    def max_tokens(self, context_length: int) -> int:
        """How many tokens it can come to hold."""
        return min(len(self.prompt) + self.sampling.max_tokens, context_length)

    @property
    def length(self) -> int:
        """Known tokens: the prompt and the output so far."""
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, end: int) -> list[int]:
        """The known tokens [start, end)."""
        prompt = len(self.prompt)
        if start >= prompt:
            return self.output[start - prompt : end - prompt]
        return self.prompt[start:end] + self.output[: max(0, end - prompt)]

    def sample_row(self, eos_token_ids: frozenset[int]) -> SampleRow:
        """What its next token is drawn by."""
        if self.seen is None and penalises(self.sampling):
            self.seen = SeenTokens(self.sampling, self.prompt)
        return SampleRow(self.sampling, self.prompt, self.output, eos_token_ids, self.seen)

    def page_addresses(self, pages: int, page_tokens: int) -> list[bytes]:
        """Of the first pages, which hold known tokens; none where it shares none."""
        return self.addresses.first(pages, self.tokens(0, pages * page_tokens)) if self.addresses else []

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    def reusable_addresses(self, page_tokens: int) -> list[bytes]:
        """Of the pages of its prompt that it may take from others.

        None where its own tokens are scored: it is computed whole. None for a replay where the codec packs: shared
        pages may stem from a conversation, whose numbers differ a little from those of the prompt as it was computed
        for the lost worker. None, for the same reason, for one that follows another where nothing is kept of that.
        """
        if self.sampling.prompt_logprobs is not None or (self.output and self.codec.packs):
            return []
        if self.fork is not None:
            return self.page_addresses(self.fork.start // page_tokens, page_tokens)
        if self.fork_of and self.codec.packs:
            return []
        tokens = reusable_tokens(len(self.prompt), page_tokens, self.codec.packs)
        return self.page_addresses(tokens // page_tokens, page_tokens)

    def raw_copy_address(self, page_tokens: int, cached_pages: int) -> bytes | None:
        """Of the last full page of its prompt, where a raw copy of that would follow so many pages found in the pool.

        None where it may take none: no token would be left to compute, the codec packs nothing, or it is a replay.
        """
        page, rest = divmod(len(self.prompt), page_tokens)
        if cached_pages != page - 1 or not cached_pages or not rest or not self.codec.packs or self.output or self.fork:
            return None
        return self.page_addresses(page, page_tokens)[-1]

    def check_emitted(self, eos_token_ids: frozenset[int], context_length: int) -> None:
        """InvalidRequest where the output so far is complete already, so that nothing can come after it."""
        for count, token in enumerate(self.output, start=1):
            if self.finish_reason(token, count, eos_token_ids, context_length) is not None:
                raise InvalidRequest(
                    f"the emitted tokens end the output at number {count} of {len(self.output)}: nothing is left"
                )

    def finish_reason(
        self, token: int, count: int, eos_token_ids: frozenset[int], context_length: int
    ) -> FinishReason.ValueType | None:
        """Why the output ends with `token` as its `count`-th token, or None where it goes on."""
        if token in eos_token_ids and not self.sampling.ignore_eos:
            return FinishReason.FINISH_REASON_EOS
        if token in self.sampling.stop_token_ids:
            return FinishReason.FINISH_REASON_STOP
        if count >= self.sampling.max_tokens or len(self.prompt) + count >= context_length:
            return FinishReason.FINISH_REASON_LENGTH
        return None
