"""The way out of one transfer: what the engine makes waits here, in host memory, until the receiver takes it.

Sections are only referred to; their bytes lie in host pages (`kvtransfer/encoded.py`) and are copied once, into the
frame that is written next. So the engine never waits for a receiver, and what waits is not there twice.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from ..kvtransfer.encoded import EncodedSection
from ..kvtransfer.frame import (
    MAX_SCORED_TOKENS,
    Binding,
    FrameWriter,
    first_token_checksum,
    prompt_logprobs_checksum,
)
from ..model.prompt_logprobs import ScoredTokens
from ..proto.common_pb2 import TransferStats
from ..proto.errors import IsthmusError
from ..proto.prefill_pb2 import FirstToken, KvFrame, PrefillEvent, PromptLogprobs


class Outbox:
    """Filled by the engine thread, emptied by the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, binding: Binding) -> None:
        self._loop = loop
        self._binding = binding
        self._writer = FrameWriter(binding)
        self._sections: deque[EncodedSection] = deque()
        self._frames: deque[KvFrame] = deque()  # made, not yet written
        self._flush = False  # what is collected leaves, even if it makes a small frame
        self._scored: deque[PromptLogprobs] = deque()
        self._first: FirstToken | None = None
        self._closing: TransferStats | None = None
        self._error: IsthmusError | None = None
        self._filled = asyncio.Event()
        self.buffered_bytes = 0  # of sections and frames that gRPC has not taken
        self.written_bytes = 0  # of frames that it has taken

    def put(self, sections: Sequence[EncodedSection], *, flush: bool = False) -> None:
        """Queues sections. `flush`: they and all before them leave now. From the engine thread."""
        if sections or flush:
            self._loop.call_soon_threadsafe(self._deliver, sections, flush)

    def put_first(self, first: FirstToken) -> None:
        """The first token, which overtakes all that waits. From the engine thread."""
        self._loop.call_soon_threadsafe(self._deliver_first, first)

    def put_scored(self, scored: ScoredTokens) -> None:
        """Log-probabilities of the prompt, which overtake frames as the first token does. From the engine thread."""
        for at in range(0, len(scored.logprobs), MAX_SCORED_TOKENS):
            part = scored.logprobs[at : at + MAX_SCORED_TOKENS]
            self._loop.call_soon_threadsafe(
                self._deliver_scored, PromptLogprobs(first=scored.first + at, logprobs=part)
            )

    def close(self, stats: TransferStats) -> None:
        """Has the commit follow the last section. From the engine thread."""
        self._loop.call_soon_threadsafe(self._deliver_close, stats)

    def fail(self, error: IsthmusError) -> None:
        """Ends the transfer with an error. From the engine thread."""
        self._loop.call_soon_threadsafe(self._deliver_error, error)

    async def get(self) -> PrefillEvent:
        """The next event; raises the error that ended the transfer."""
        while (event := self._next()) is None:
            self._filled.clear()
            await self._filled.wait()
        return event

    def wrote(self, event: PrefillEvent) -> None:
        """Counts an event that gRPC has taken."""
        if event.HasField("frame"):
            self.buffered_bytes -= len(event.frame.payload)
            self.written_bytes += event.frame.ByteSize()

    def _next(self) -> PrefillEvent | None:
        if self._error:
            raise self._error
        if self._scored:
            scored = self._scored.popleft()
            scored.checksum = prompt_logprobs_checksum(self._binding, scored)
            return PrefillEvent(prompt_logprobs=scored)
        if self._first:
            first, self._first = self._first, None
            first.checksum = first_token_checksum(self._binding, first)
            return PrefillEvent(first_token=first)
        while self._sections and not self._frames:
            section = self._sections.popleft()
            self._frames.extend(self._writer.add(section.header, section.parts))
        if not self._frames and self._flush:
            self._flush = False
            self._frames.extend(self._writer.flush())
        if self._frames:
            return PrefillEvent(frame=self._frames.popleft())
        return self._commit() if self._closing else None

    def _commit(self) -> PrefillEvent:
        commit, digest = self._writer.commit(), self._writer.digest
        assert self._closing is not None
        commit.stats.CopyFrom(self._closing)
        commit.stats.frames, commit.stats.kv_bytes_wire = digest.frames, digest.wire_bytes
        return PrefillEvent(commit=commit)

    def _deliver(self, sections: Sequence[EncodedSection], flush: bool) -> None:
        self.buffered_bytes += sum(section.header.nbytes for section in sections)
        self._sections.extend(sections)
        self._flush |= flush
        self._filled.set()

    def _deliver_first(self, first: FirstToken) -> None:
        self._first = first
        self._filled.set()

    def _deliver_scored(self, scored: PromptLogprobs) -> None:
        self._scored.append(scored)
        self._filled.set()

    def _deliver_close(self, stats: TransferStats) -> None:
        self._closing, self._flush = stats, True
        self._filled.set()

    def _deliver_error(self, error: IsthmusError) -> None:
        self._error = error
        self._filled.set()
