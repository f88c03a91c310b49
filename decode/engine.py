"""The decode engine: admits requests, takes in their pages, steps the batch, hands out tokens."""

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..kvtransfer.receiver import KvReceiver, ReceivedSection
from ..model.model import Model
from ..model.sampling import SampledToken, sample
from ..proto.errors import EngineFailed, Exhausted, IsthmusError, Unavailable, without_paths
from ..worker.engine import EngineThread
from ..worker.out_of_memory import is_out_of_memory, no_memory
from ..worker.rates import Rates
from .admission import Admission
from .config import DecodeConfig
from .pool.base import KvStore
from .sequences.scheduler import DecodeScheduler, SequenceId, State
from .sequences.sequence import Advance, DecodeSequence, Token
from .stepping.padded_steps import PaddedSteps
from .stepping.planner import StepPlanner
from .stepping.runner import DecodeRunner

log = logging.getLogger(__name__)

MIB = 1 << 20
IDLE_DECODE_BYTES = 32 * MIB  # decoded between two looks at the inbox where no batch waits for its step


@dataclass(frozen=True)
class _Arrived:
    """A checked section of a prompt's KV, still encoded."""

    sequence: DecodeSequence
    receiver: KvReceiver
    section: ReceivedSection


@dataclass(frozen=True)
class _Start:
    """The request joins the batch; what of its prompt is to come from others has arrived before this.

    `drawn`: its first token, where that was drawn elsewhere and is part of its output from now on.
    """

    sequence: DecodeSequence
    computed: int
    drawn: int | None


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
        config: DecodeConfig,
        local_tokens: int,
        padded: PaddedSteps | None,
        on_failure: Callable[[str], None],
    ) -> None:
        self._model, self._store, self._scheduler = model, store, scheduler
        self._sequences: dict[SequenceId, DecodeSequence] = {}
        self._arrivals: deque[_Arrived | _Start] = deque()
        self._in_step: list[DecodeSequence] = []  # whom a failure of the engine now is put down to
        self._on_failure = on_failure
        self._planner = StepPlanner(
            *(model, store),
            page_tokens=config.page_tokens,
            chunk_tokens=config.chunk_tokens,
            local_tokens=local_tokens,
        )
        self._decode_bytes = config.decode_mib_per_step * MIB
        self._inbox_limit = config.inbox_mib * MIB
        self._inbox_bytes = 0  # delivered and not decoded; the event loop's thread alone counts it
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._loop = asyncio.get_running_loop()
        self.counters: Counter[str] = Counter()
        self.admission = Admission(
            *(scheduler, store, self._sequences),
            headroom_tokens=config.headroom_tokens,
            host_bytes=int(config.preempt_gib * (1 << 30)),
            tokens_at_most=lambda sequence: sequence.tokens_at_most(model.context_length),
            counters=self.counters,
        )
        self.rates = Rates()
        self.failure: str | None = None
        self.thread = EngineThread("decode-engine", self._step, self._fail)
        self._runner = DecodeRunner(model, store, padded, before_layer=self.thread.reach_part)

    # From the event loop's thread.

    def submit(self, sequence: DecodeSequence) -> None:
        """Queues a request for pages; `sequence.stream.admitted()` returns once it holds them."""
        self.thread.post(lambda: self._add(sequence))

    async def deliver(self, sequence: DecodeSequence, receiver: KvReceiver, sections: list[ReceivedSection]) -> None:
        """Hands over checked sections; waits while too much is not decoded yet."""
        while self._inbox_bytes >= self._inbox_limit and not self.failure:  # one of those that wait may have filled it
            await self._has_room.wait()
        if self.failure:
            raise Unavailable(self.failure)
        self._count_inbox(sum(len(section.data) for section in sections))
        arrived = [_Arrived(sequence, receiver, section) for section in sections]
        self.thread.post(lambda: self._arrivals.extend(arrived))

    def complete(self, sequence: DecodeSequence, first: int) -> None:
        """The prompt's KV was delivered in full: the request joins the batch.

        `first` is its first token, which a request with output of a lost decode worker has in that output already.
        """
        drawn = None if sequence.output else first
        self.thread.post(lambda: self._arrivals.append(_Start(sequence, len(sequence.prompt), drawn)))

    def compute(self, sequence: DecodeSequence, first: int | None) -> None:
        """Has the engine compute the prompt itself. `first`: its first token, where a prefill worker drew it."""
        drawn = None if sequence.output else first
        self.thread.post(lambda: self._arrivals.append(_Start(sequence, sequence.held, drawn)))

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
            self._scheduler.add(
                sequence.id,
                prompt_tokens=len(sequence.prompt),
                tokens=sequence.tokens_at_most(self._model.context_length),
                rank=sequence.rank,
                arrived_s=sequence.arrived_s,
            )

    def _remove(self, sequence: DecodeSequence) -> None:
        if self._sequences.pop(sequence.id, None):
            self._scheduler.remove(sequence.id)
            self.admission.release(sequence)
            sequence.local = None  # its handler may keep the sequence for a while
        if not self._sequences:
            assert not self._store.in_use and not self.admission.saved_bytes, "pages are in use with no request"

    def _step(self) -> bool:
        if queue := self._scheduler.queue():
            with self.thread.computing(sum(self._sequences[id].length for id in queue), measured=False):
                admitted = self.admission.admit()
            for sequence in admitted:
                self._loop.call_soon_threadsafe(sequence.stream.admit)
        took_in = self._take_in(self._decode_bytes if self._scheduler.count(State.RUNNING) else IDLE_DECODE_BYTES)
        sequences = [self._sequences[id] for id in self._scheduler.batch()]
        awaited = [self._sequences[id] for id in self._scheduler.receiving()]
        for plan in self._planner.plans(sequences, awaited):
            if work := self.admission.with_room(plan):
                if opened := self._open_prompts(work):
                    self._advance(opened)
                return True
        return took_in

    def _open_prompts(self, work: Sequence[Advance]) -> list[Advance]:
        """Prepares first chunks; those for whose prompt there is no memory end, and are left out."""
        opened = []
        for advance in work:
            self._in_step = [advance.sequence]
            try:
                self._planner.open_prompt(advance)
                opened.append(advance)
            except Exception as error:
                self._end(advance.sequence, no_memory(error, "prompt"))
        self._in_step = []
        return opened

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
                self._start(arrival)
        if done_bytes:
            self._loop.call_soon_threadsafe(self._count_inbox, -done_bytes)
            self.counters["kv_bytes_received"] += done_bytes
        return some

    def _receive(self, arrival: _Arrived) -> None:
        sequence = arrival.sequence
        if sequence.id not in self._sequences:
            return
        self._in_step = [sequence]
        try:
            self._store.receive(sequence, arrival.receiver, arrival.section)
        except IsthmusError as error:
            self._end(sequence, error)
        except Exception as error:
            self._end(sequence, no_memory(error, "transfer"))
        self._in_step = []

    def _start(self, start: _Start) -> None:
        sequence, prompt = start.sequence, len(start.sequence.prompt)
        sequence.computed = start.computed
        if start.drawn is not None:
            sequence.output.append(start.drawn)
            self.counters["output_tokens"] += 1
        self.counters["replayed_tokens"] += max(0, len(sequence.output) - 1)
        if sequence.computed == prompt:
            self._store.publish(sequence, prompt)
        else:
            self.counters["local_prompts"] += 1
            self.counters["local_prompt_tokens"] += prompt - sequence.computed
        self._scheduler.run(sequence.id)

    def _advance(self, work: list[Advance]) -> None:
        """One step, or two halves of it where there is no memory for the whole; what there is none for by itself ends.

        A step that failed for that has changed nothing but KV of its own tokens, which is written again.
        """
        self._in_step = [advance.sequence for advance in work]
        started_s, pages = time.monotonic(), self._store.in_use
        with self.thread.computing(sum(advance.end - advance.start for advance in work)):
            drawn = self._compute(work)
            if drawn is not None:
                self._hand_over(work, drawn)
                self._measure(work, pages, time.monotonic() - started_s)
        self._in_step = []
        if drawn is not None:
            return
        self.counters["out_of_memory"] += 1
        if len(work) > 1:
            self._advance(work[: len(work) // 2])
            self._advance(work[len(work) // 2 :])
        else:
            tokens = work[0].end - work[0].start
            self._end(work[0].sequence, Exhausted(f"no memory here for a step of {tokens} tokens of one request"))

    def _compute(self, work: Sequence[Advance]) -> list[SampledToken] | None:
        """The tokens of those that sample, in order; None where there is no memory for the step."""
        eos = self._model.eos_token_ids
        batch = [advance.sequence for advance in work if advance.samples]
        try:
            logits_RV = self._runner.run(work)
            return sample(logits_RV, [sequence.sample_row(eos) for sequence in batch]) if batch else []
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("no memory for a step", extra={"fields": {"requests": len(work), "why": str(error)}})
            return None

    def _hand_over(self, work: Sequence[Advance], drawn: Sequence[SampledToken]) -> None:
        """What follows a step that was computed: tokens are delivered to all handlers in one go."""
        eos, context = self._model.eos_token_ids, self._model.context_length
        batch = [advance.sequence for advance in work if advance.samples]
        for advance in work:
            self._finish_chunk(advance)
        for sequence, error in self._store.end_step([a for a in work if a.sequence.id in self._sequences]):
            self._end(sequence, error)
        tokens = []
        for sequence, token in zip(batch, drawn, strict=True):
            if sequence.id not in self._sequences:
                continue
            if not sequence.output:
                sequence.timing.sampled_s, sequence.timing.sampled_unix_ns = time.monotonic(), time.time_ns()
            sequence.drew(token.token_id)
            finish = sequence.finish_reason(token.token_id, len(sequence.output), eos, context)
            if finish is not None:
                self._finish(sequence)
            tokens.append((sequence.stream, Token(token.token_id, token.logprobs_pb(), finish)))
        self._loop.call_soon_threadsafe(_hand_out, tokens)
        self.counters["steps"] += 1
        self.counters["graph_steps"] = self._runner.graph_steps
        self.counters["output_tokens"] += len(tokens)

    def _finish(self, sequence: DecodeSequence) -> None:
        """Leaves the pages of a complete answer for the conversation's next turn."""
        with contextlib.suppress(IsthmusError):  # pages that cannot be packed are not kept
            self._store.seal(sequence)
        self._remove(sequence)

    def _measure(self, work: list[Advance], pages: int, seconds: float) -> None:
        """Steps that are all of one kind are measured for the router."""
        if all(advance.end - advance.start == 1 for advance in work):
            self.rates.stepped(len(work), pages, seconds)
        elif all(advance.in_prompt for advance in work):
            self.rates.computed([(advance.start, advance.end) for advance in work], seconds)

    def _finish_chunk(self, advance: Advance) -> None:
        sequence = advance.sequence
        sequence.computed = advance.end
        if sequence.local and sequence.local.failure:
            self._end(sequence, sequence.local.failure)
        if advance.end >= len(sequence.prompt):
            sequence.local = None

    def _end(self, sequence: DecodeSequence, error: IsthmusError) -> None:
        """Ends a request with an error; the others go on."""
        self._remove(sequence)
        self._loop.call_soon_threadsafe(sequence.stream.put, error)

    def _fail(self, error: BaseException) -> None:
        self.failure = f"the decode engine failed: {type(error).__name__}: {without_paths(str(error))}"
        failed = [sequence for sequence in self._in_step if sequence.id in self._sequences]
        for sequence in list(self._sequences.values()):
            told = EngineFailed(self.failure, len(failed)) if sequence in failed else Unavailable(self.failure)
            self._loop.call_soon_threadsafe(sequence.stream.put, told)
        self._loop.call_soon_threadsafe(self._has_room.set)
        self._on_failure(self.failure)

    @property
    def inbox_bytes(self) -> int:
        """Received and not decoded."""
        return self._inbox_bytes

    @property
    def local_bytes(self) -> int:
        """Of prompts that are computed here, beside the pool."""
        return sum(local.nbytes for s in list(self._sequences.values()) if (local := s.local))

    def running(self) -> int:
        """Sequences that hold pages, in the pool or in host memory."""
        return self._scheduler.count(State.RECEIVING, State.RUNNING, State.PREEMPTED)


def _hand_out(tokens: list[tuple]) -> None:
    for stream, token in tokens:
        stream.put(token)
