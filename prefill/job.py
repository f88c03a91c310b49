"""One prompt on its way through a prefill worker."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..kvtransfer.allocator import Run
from ..kvtransfer.sender import KvSender
from ..proto.common_pb2 import TransferStats
from ..proto.errors import IsthmusError
from ..proto.prefill_pb2 import KvFrame, PrefillEvent
from ..proto.sampling import Sampling
from .scheduler import JobId


class Outbox:
    """The send buffer of one transfer, in host memory: the engine fills it and never waits for the receiver."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[PrefillEvent | IsthmusError] = deque()
        self._filled = asyncio.Event()
        self.buffered_bytes = 0  # payloads that are not written yet
        self.written_bytes = 0  # frames that gRPC has taken

    def put(self, events: list[PrefillEvent], *, urgent: bool = False) -> None:
        """Queues events, ahead of all others where urgent. From the engine thread."""
        self._loop.call_soon_threadsafe(self._deliver, events, urgent)

    def fail(self, error: IsthmusError) -> None:
        """Ends the transfer with an error. From the engine thread."""
        self._loop.call_soon_threadsafe(self._deliver, [error], True)

    async def get(self) -> PrefillEvent:
        """The next event; raises the error that ended the transfer."""
        while not self._events:
            self._filled.clear()
            await self._filled.wait()
        event = self._events.popleft()
        if isinstance(event, IsthmusError):
            raise event
        return event

    def wrote(self, event: PrefillEvent) -> None:
        """Counts an event that gRPC has taken."""
        self.buffered_bytes -= _payload(event)
        if event.HasField("frame"):
            self.written_bytes += event.frame.ByteSize()

    def _deliver(self, events: Sequence[PrefillEvent | IsthmusError], urgent: bool) -> None:
        self.buffered_bytes += sum(_payload(event) for event in events)
        if urgent:
            self._events.extendleft(reversed(events))
        else:
            self._events.extend(events)
        self._filled.set()


def _payload(event: PrefillEvent | IsthmusError) -> int:
    return len(event.frame.payload) if isinstance(event, PrefillEvent) else 0


@dataclass(eq=False)
class PrefillJob:
    """A request as the engine sees it. The engine thread alone changes it, but for the outbox."""

    id: JobId
    worker: str  # that computes it, for the statistics
    attempt: int
    token_ids: list[int]
    sampling: Sampling
    sender: KvSender
    outbox: Outbox
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None  # when its first chunk began
    runs: tuple[Run, ...] = ()  # its pages, from the first chunk to the first token
    failure: IsthmusError | None = None  # its KV cannot be sent (a NaN, say)

    def put_frames(self, frames: list[KvFrame]) -> None:
        """Queues frames for sending. From the engine thread."""
        if frames:
            self.outbox.put([PrefillEvent(frame=frame) for frame in frames])

    def stats(self, *, sampled_unix_ns: int, sampled_s: float, written_before: int) -> TransferStats:
        """What the transfer cost, once all frames are made."""
        started = self.started_s or sampled_s
        digest = self.sender.digest
        return TransferStats(
            kv_bytes_bf16=self.sender.bf16_bytes,
            kv_bytes_wire=digest.wire_bytes,
            kv_bytes_before_prefill_end=written_before,
            frames=digest.frames,
            queue_ms=(started - self.arrived_s) * 1e3,
            prefill_ms=(sampled_s - started) * 1e3,
            first_token_unix_ns=sampled_unix_ns,
            prefill_worker=self.worker,
            attempt=self.attempt,
        )
