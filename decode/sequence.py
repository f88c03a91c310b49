"""One request on its way through a decode worker."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from ..kvtransfer.codecs import PageCodec
from ..proto.common_pb2 import FinishReason, TokenLogprobs
from ..proto.decode_pb2 import DecodeEvent
from ..proto.errors import IsthmusError
from ..proto.sampling import Sampling
from .scheduler import SequenceId


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
        self._items: deque[Token | IsthmusError] = deque()
        self._filled = asyncio.Event()
        self._admitted = asyncio.Event()

    def put(self, item: Token | IsthmusError) -> None:
        self._items.append(item)
        self._filled.set()
        self._admitted.set()

    def admit(self) -> None:
        """The request holds its pages now."""
        self._admitted.set()

    async def admitted(self) -> None:
        """Returns once the request holds its pages; raises the error that ended it before."""
        await self._admitted.wait()
        if self._items and isinstance(self._items[0], IsthmusError):
            raise self._items[0]

    async def get(self) -> Token:
        """The next token; raises the error that ended the request."""
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        item = self._items.popleft()
        if isinstance(item, IsthmusError):
            raise item
        return item


@dataclass(eq=False)
class DecodeSequence:
    """A request as the engine sees it. The engine thread alone changes it, but for the stream."""

    id: SequenceId
    prompt: list[int]
    sampling: Sampling
    codec: PageCodec
    stream: TokenStream
    output: list[int] = field(default_factory=list)
    released: bool = False

    def tokens_at_most(self, context_length: int) -> int:
        """How many tokens it can come to hold, which is what it reserves pages for."""
        return min(len(self.prompt) + self.sampling.max_tokens, context_length)

    @property
    def length(self) -> int:
        """Tokens so far, the newest of which has no KV yet."""
        return len(self.prompt) + len(self.output)

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
