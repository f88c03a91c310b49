"""The decode engine: admits requests, takes in their pages, steps the batch, hands out tokens."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from ..kvtransfer.receiver import KvReceiver, ReceivedSection
from ..model.engine import EngineThread
from ..model.model import Model
from ..model.rates import Rates
from ..model.sampling import SampleRow, sample
from ..proto.errors import IsthmusError, Unavailable
from .runner import DecodeRunner
from .scheduler import DecodeScheduler, SequenceId, State
from .sequence import DecodeSequence, Token
from .store import KvStore

MIB = 1 << 20
IDLE_DECODE_BYTES = 32 * MIB  # decoded between two looks at the inbox where no batch waits for its step


@dataclass(frozen=True)
class _Arrived:
    """A checked section of a prompt's KV, still encoded."""

    sequence: DecodeSequence
    receiver: KvReceiver
    section: ReceivedSection


@dataclass(frozen=True)
class _Complete:
    """All of a prompt's KV has arrived before this; `first` is its first token."""

    sequence: DecodeSequence
    first: int


class DecodeEngine:
    """Owns the model, the pool and the sequences; its thread alone touches them.

    Page ownership: a sequence gets its pages at admission and returns them at its release, which its handler calls
    exactly when the call ends, however it ends.
    """

    def __init__(
        self,
        model: Model,
        store: KvStore,
        scheduler: DecodeScheduler,
        *,
        inbox_mib: int,
        decode_mib_per_step: int,
        on_failure: Callable[[str], None],
    ) -> None:
        self._model, self._store, self._scheduler = model, store, scheduler
        self._runner = DecodeRunner(model, store)
        self._sequences: dict[SequenceId, DecodeSequence] = {}
        self._arrivals: deque[_Arrived | _Complete] = deque()
        self._on_failure = on_failure
        self._decode_bytes = decode_mib_per_step * MIB
        self._inbox_limit = inbox_mib * MIB
        self._inbox_bytes = 0  # delivered and not decoded; the event loop's thread alone counts it
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._loop = asyncio.get_running_loop()
        self.counters: Counter[str] = Counter()
        self.rates = Rates()
        self.failure: str | None = None
        self.thread = EngineThread("decode-engine", self._step, self._fail)

    # From the event loop's thread.

    def submit(self, sequence: DecodeSequence) -> None:
        """Queues a request for pages; `sequence.stream.admitted()` returns once it holds them."""
        self.thread.post(lambda: self._add(sequence))

    async def deliver(self, sequence: DecodeSequence, receiver: KvReceiver, sections: list[ReceivedSection]) -> None:
        """Hands over checked sections; waits while too much is not decoded yet."""
        await self._has_room.wait()
        if self.failure:
            raise Unavailable(self.failure)
        self._count_inbox(sum(len(section.data) for section in sections))
        arrived = [_Arrived(sequence, receiver, section) for section in sections]
        self.thread.post(lambda: self._arrivals.extend(arrived))

    def complete(self, sequence: DecodeSequence, first: int) -> None:
        """The prompt's KV was delivered in full: the request joins the batch with its first token."""
        self.thread.post(lambda: self._arrivals.append(_Complete(sequence, first)))

    def release(self, sequence: DecodeSequence) -> None:
        """Ends a request at any point of its life and frees what it holds. Called once for each submitted one."""
        sequence.released = True
        self.thread.post(lambda: self._remove(sequence))

    def _count_inbox(self, change: int) -> None:
        self._inbox_bytes += change
        if self._inbox_bytes < self._inbox_limit:
            self._has_room.set()
        else:
            self._has_room.clear()

    # In the engine thread.

    def _add(self, sequence: DecodeSequence) -> None:
        if self.failure:
            self._loop.call_soon_threadsafe(sequence.stream.put, Unavailable(self.failure))
            return
        if not sequence.released:
            self._sequences[sequence.id] = sequence
            tokens = sequence.tokens_at_most(self._model.context_length)
            self._scheduler.add(sequence.id, len(sequence.prompt), tokens)

    def _remove(self, sequence: DecodeSequence) -> None:
        if self._sequences.pop(sequence.id, None):
            self._scheduler.remove(sequence.id)
            self._store.release(sequence)
        if not self._sequences:
            assert self._store.free_pages == self._store.total_pages, "pages are in use with no request"

    def _step(self) -> bool:
        self._admit()
        batch = [self._sequences[sequence] for sequence in self._scheduler.batch()]
        took_in = self._take_in(self._decode_bytes if batch else IDLE_DECODE_BYTES)
        if batch:
            self._advance(batch)
        return took_in or bool(batch)

    def _admit(self) -> None:
        for sequence_id, pages in self._scheduler.admit(self._store.free_pages):
            sequence = self._sequences[sequence_id]
            self._store.admit(sequence, pages)
            self._loop.call_soon_threadsafe(sequence.stream.admit)

    def _take_in(self, byte_budget: int) -> bool:
        """Decodes received sections into the pool, and starts sequences that are complete."""
        done_bytes = 0
        some = bool(self._arrivals)
        while self._arrivals and done_bytes < byte_budget:
            arrival = self._arrivals.popleft()
            if isinstance(arrival, _Arrived):
                done_bytes += len(arrival.section.data)
                self._receive(arrival)
            elif arrival.sequence.id in self._sequences:
                arrival.sequence.output.append(arrival.first)
                self.counters["output_tokens"] += 1
                self._scheduler.run(arrival.sequence.id)
        if done_bytes:
            self._loop.call_soon_threadsafe(self._count_inbox, -done_bytes)
            self.counters["kv_bytes_received"] += done_bytes
        return some

    def _receive(self, arrival: _Arrived) -> None:
        sequence = arrival.sequence
        if sequence.id not in self._sequences:
            return
        try:
            self._store.receive(sequence, arrival.receiver, arrival.section)
        except IsthmusError as error:
            self._end(sequence, error)

    def _advance(self, batch: list[DecodeSequence]) -> None:
        """One step: a token for each sequence, delivered to all handlers in one go."""
        eos, context = self._model.eos_token_ids, self._model.context_length
        started_s, pages = time.monotonic(), self._store.total_pages - self._store.free_pages
        logits_BV = self._runner.run(batch)
        for sequence, error in self._store.end_step(batch):
            self._end(sequence, error)
        rows = [SampleRow(s.sampling, s.prompt, s.output, eos) for s in batch]
        drawn = sample(logits_BV, rows)
        tokens = []
        for sequence, token in zip(batch, drawn, strict=True):
            if sequence.id not in self._sequences:
                continue
            sequence.output.append(token.token_id)
            finish = sequence.finish_reason(token.token_id, len(sequence.output), eos, context)
            if finish is not None:
                self._remove(sequence)
            tokens.append((sequence.stream, Token(token.token_id, token.logprobs_pb(), finish)))
        self._loop.call_soon_threadsafe(_hand_out, tokens)
        self.counters["steps"] += 1
        self.rates.stepped(len(batch), pages, time.monotonic() - started_s)
        self.counters["output_tokens"] += len(tokens)

    def _end(self, sequence: DecodeSequence, error: IsthmusError) -> None:
        """Ends a request with an error; the others go on."""
        self._remove(sequence)
        self._loop.call_soon_threadsafe(sequence.stream.put, error)

    def _fail(self, error: BaseException) -> None:
        self.failure = f"the decode engine failed: {type(error).__name__}: {error}"
        for sequence in list(self._sequences.values()):
            self._loop.call_soon_threadsafe(sequence.stream.put, Unavailable(self.failure))
        self._loop.call_soon_threadsafe(self._has_room.set)
        self._on_failure(self.failure)

    def running(self) -> int:
        """Sequences that hold pages."""
        return self._scheduler.count(State.RECEIVING) + self._scheduler.count(State.RUNNING)


def _hand_out(tokens: list[tuple]) -> None:
    for stream, token in tokens:
        stream.put(token)
