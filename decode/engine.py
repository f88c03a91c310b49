"""The decode engine: gives requests pages, takes in their KV, steps the batch, delivers tokens."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ..kvtransfer.receiver import KvReceiver, ReceivedSection
from ..model.hidden import HiddenStates
from ..model.model import Model
from ..model.prompt_logprobs import ScoredTokens, score_chunk
from ..model.sampling import SampledToken, sample, sample_forks
from ..proto.errors import EngineFailed, Exhausted, IsthmusError, Unavailable, without_paths
from ..worker.engine import EngineThread, is_out_of_memory, no_memory
from ..worker.rates import Rates
from ..worker.step_plan import SequenceId, SequencePages, SequencePlan, StepBatch, StepPlan
from .config import DecodeConfig
from .graphs import PaddedSteps
from .inbox import Inbox, ReceivedKv, Start
from .page_manager import PageManager
from .pool.base import KvPool
from .pool.forks import ForkedPrompts
from .pool.local import needs_raw
from .runner import DecodeRunner
from .scheduler import DecodeScheduler, State
from .sequence import DecodeSequence, Token, TokenStream

log = logging.getLogger(__name__)

MIB = 1 << 20
IDLE_DECODE_BYTES = 32 * MIB  # decoded between two looks at the inbox where no batch waits for its step


class DecodeEngine:
    """Owns the model, the pool and the sequences; its thread alone touches them.

    Page ownership: a sequence gets its pages from `pages` and returns them at its `drop`, which its handler calls
    exactly when the call ends, however it ends.
    """

    def __init__(
        self,
        model: Model,
        pool: KvPool,
        scheduler: DecodeScheduler,
        *,
        config: DecodeConfig,
        padded: PaddedSteps | None,
        on_failure: Callable[[str], None],
    ) -> None:
        self._model, self._pool, self._scheduler = model, pool, scheduler
        self._sequences: dict[SequenceId, DecodeSequence] = {}
        self.counters: Counter[str] = Counter()
        self._scored: list[tuple[DecodeSequence, ScoredTokens]] = []  # of prompts, in the step that runs
        self._for_forks: list[tuple[DecodeSequence, tuple[SampledToken, ...]]] = []  # drawn in it
        self._prompts = ForkedPrompts(pool, len(model.layers), self.counters)
        self._in_step: list[DecodeSequence] = []  # whom a failure of the engine now is put down to
        self._on_failure = on_failure
        self._decode_bytes = config.decode_mib_per_step * MIB
        self.inbox = Inbox(config.inbox_mib * MIB)
        self._loop = asyncio.get_running_loop()
        self.pages = PageManager(
            *(scheduler, pool, self._sequences),
            headroom_tokens=config.headroom_tokens,
            host_bytes=int(config.preempt_gib * (1 << 30)),
            max_tokens=lambda sequence: sequence.max_tokens(model.context_length),
            counters=self.counters,
        )
        self.rates = Rates()
        self.failure: str | None = None
        self.thread = EngineThread("decode-engine", self._step, self._fail)
        self._runner = DecodeRunner(model, pool, padded, before_layer=self.thread.begin_part)

    # From the event loop's thread.

    def submit(self, sequence: DecodeSequence) -> None:
        """Queues a request for pages; `sequence.stream.wait_for_pages()` returns once it holds them."""
        self.thread.post(lambda: self._add(sequence))

    async def deliver(self, sequence: DecodeSequence, receiver: KvReceiver, sections: list[ReceivedSection]) -> None:
        """Hands over checked sections; waits while too much is not decoded yet."""
        await self.inbox.wait_for_room()
        if self.failure:
            raise Unavailable(self.failure)
        received = [ReceivedKv(sequence, receiver, section) for section in sections]
        self.inbox.count(sum(kv.nbytes for kv in received))
        self.thread.post(lambda: self.inbox.add(received))

    def complete(self, sequence: DecodeSequence, first: int, for_forks: tuple[SampledToken, ...] = ()) -> None:
        """The prompt's KV was delivered in full: the request joins the batch.

        `first` is its first token, which a request with output of a lost decode worker has in that output already;
        `for_forks` are those of the answers that follow.
        """
        drawn = None if sequence.output else first
        self._start_later(Start(sequence, len(sequence.prompt), drawn, for_forks))

    def compute(self, sequence: DecodeSequence, first: int | None) -> None:
        """Has the engine compute the prompt itself. `first`: its first token, where a prefill worker drew it."""
        drawn = None if sequence.output else first
        self._start_later(Start(sequence, sequence.cached_tokens, drawn))

    def drop(self, sequence: DecodeSequence) -> None:
        """Ends a request at any point of its life and frees what it holds. Called once for each submitted one."""
        sequence.dropped = True
        self.thread.post(lambda: self._remove(sequence))

    def _start_later(self, start: Start) -> None:
        self.thread.post(lambda: self.inbox.add((start,)))

    # In the engine thread.

    def _add(self, sequence: DecodeSequence) -> None:
        if self.failure:
            self._loop.call_soon_threadsafe(sequence.stream.put, Unavailable(self.failure))
            return
        if not sequence.dropped:
            if sequence.fork_of:
                self._prompts.follow(sequence)
            self._sequences[sequence.id] = sequence
            self._scheduler.add_request(
                sequence.id,
                prompt_tokens=len(sequence.prompt),
                output_tokens=len(sequence.output),
                max_tokens=sequence.max_tokens(self._model.context_length),
                rank=sequence.rank,
                arrived_s=sequence.arrived_s,
                alone=sequence.alone,
            )

    def _remove(self, sequence: DecodeSequence) -> None:
        if self._sequences.pop(sequence.id, None):
            self._scheduler.remove_request(sequence.id)
            self.pages.free(sequence)
            self._runner.close_prompt(sequence.id)
        if not self._sequences:
            assert not self._pool.in_use and not self.pages.saved_bytes, "pages are in use with no request"

    def _step(self) -> bool:
        if queue := self._scheduler.queue():
            with self.thread.computing(sum(self._sequences[id].length for id in queue), measured=False):
                allocated = self.pages.allocate_waiting()
            for sequence in allocated:
                self._prompts.begin(sequence)
                self._loop.call_soon_threadsafe(sequence.stream.mark_allocated)
        took_in = self._take_in(self._decode_bytes if self._scheduler.count(State.RUNNING) else IDLE_DECODE_BYTES)
        plan = self._scheduler.plan(time.monotonic(), self.pages.allocate_step)
        if not plan:
            return took_in
        if opened := self._open_prompts(plan):
            self._compute(opened)
        return True

    def _open_prompts(self, plan: StepPlan) -> StepPlan:
        """Prepares chunks of prompts; those for whose prompt there is no memory end, and are left out."""
        if not any(part.in_prompt for part in plan.sequences):
            return plan
        opened = list[SequencePlan]()
        for part in plan.sequences:
            sequence = self._sequences[part.sequence]
            self._in_step = [sequence]
            try:
                if part.in_prompt:
                    sequence.timing.began_s = sequence.timing.began_s or time.monotonic()
                    self._runner.open_prompt(part, self._pool.step_pages(sequence, part.end))
                opened.append(part)
            except Exception as error:
                self._end(sequence, no_memory(error, "prompt"))
        self._in_step = []
        return StepPlan(tuple(opened))

    def _take_in(self, byte_budget: int) -> bool:
        """Decodes received sections into the pool, and starts sequences that are complete."""
        decoded_bytes, some = 0, False
        while decoded_bytes < byte_budget and (arrival := self.inbox.take()):
            some = True
            if isinstance(arrival, ReceivedKv):
                decoded_bytes += arrival.nbytes
                self._receive(arrival)
            elif arrival.sequence.id in self._sequences:
                self._start(arrival)
        if decoded_bytes:
            self.inbox.count_decoded(decoded_bytes)
            self.counters["kv_bytes_received"] += decoded_bytes
        return some

    def _receive(self, arrival: ReceivedKv) -> None:
        sequence = arrival.sequence
        if sequence.id not in self._sequences:
            return
        self._in_step = [sequence]
        try:
            self._pool.receive(sequence, arrival.receiver, arrival.section)
        except IsthmusError as error:
            self._end(sequence, error)
        except Exception as error:
            self._end(sequence, no_memory(error, "transfer"))
        self._in_step = []

    def _start(self, start: Start) -> None:
        sequence, prompt = start.sequence, len(start.sequence.prompt)
        sequence.computed = start.computed
        if start.drawn is not None:
            sequence.output.append(start.drawn)
            self.counters["output_tokens"] += 1
        self.counters["replayed_tokens"] += max(0, len(sequence.output) - 1)
        raw_tokens = 0
        if sequence.computed == prompt:
            self._pool.publish(sequence, prompt)
            self._prompts.keep(sequence, start.for_forks)
        else:
            self.counters["local_prompts"] += 1
            self.counters["local_prompt_tokens"] += prompt - sequence.computed
            codec, page_tokens = sequence.codec, self._pool.page_tokens
            raw_tokens = prompt * needs_raw(codec, self._model.dtype, sequence.computed, prompt, page_tokens)
        self._scheduler.mark_running(
            sequence.id, computed=sequence.computed, known=sequence.length, raw_tokens=raw_tokens
        )

    def _compute(self, plan: StepPlan) -> None:
        """One step, or two halves of it where there is no memory for the whole; what there is none for by itself ends.

        A step that failed for that has changed nothing but KV of its own tokens, which is written again.
        """
        self._in_step = [self._sequences[part.sequence] for part in plan.sequences]
        started_s, pages = time.monotonic(), self._pool.in_use
        with self.thread.computing(plan.tokens):
            drawn = self._draw(plan)
            if drawn is not None:
                self._finish_step(plan, drawn)
                self._measure(plan, pages, time.monotonic() - started_s)
        self._in_step = []
        if drawn is not None:
            return
        self.counters["out_of_memory"] += 1
        if half := len(plan.sequences) // 2:
            self._compute(StepPlan(plan.sequences[:half]))
            self._compute(StepPlan(plan.sequences[half:]))
            return
        for part in plan.sequences:
            what = f"a step of {plan.tokens} tokens of one request"
            self._end(self._sequences[part.sequence], Exhausted(f"no memory here for {what}"))

    def _draw(self, plan: StepPlan) -> list[SampledToken] | None:
        """The tokens of those that sample, in order; None where there is no memory for the step."""
        eos = self._model.eos_token_ids
        sampling = [self._sequences[part.sequence] for part in plan.sequences if part.samples]
        self._scored = []
        try:
            logits_RV = self._runner.run(self._batch(plan), self._scorer(plan))
            rows = [sequence.sample_row(eos) for sequence in sampling]
            self._for_forks = [
                (sequence, sample_forks(logits_RV[index], rows[index], sequence.forks))
                for index, sequence in enumerate(sampling)
                if sequence.forks and not sequence.output
            ]
            return sample(logits_RV, rows) if sampling else []
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fields = {"requests": len(plan.sequences), "why": str(error)}
            log.warning("no memory for a step", extra={"fields": fields})
            return None

    def _scorer(self, plan: StepPlan) -> Callable[[HiddenStates, Sequence[int]], None] | None:
        """What finds the log-probabilities of prompts that ask for them in a step; None where none does."""
        sequences = [self._sequences[part.sequence] for part in plan.sequences]
        if all(sequence.sampling.prompt_logprobs is None for sequence in sequences):
            return None

        def score(hidden: HiddenStates, rows: Sequence[int]) -> None:
            for sequence, part, row in zip(sequences, plan.sequences, rows, strict=True):
                top = sequence.sampling.prompt_logprobs
                if part.in_prompt and top is not None:
                    self.thread.begin_part()
                    span = (row, sequence.prompt, part.start, part.end)
                    self._scored.append((sequence, score_chunk(hidden, *span, top, self._model.vocab_size)))

        return score if any(part.in_prompt for part in plan.sequences) else None

    def _batch(self, plan: StepPlan) -> StepBatch:
        token_ids, pages = list[tuple[int, ...]](), list[SequencePages]()
        for part in plan.sequences:
            sequence = self._sequences[part.sequence]
            token_ids.append(tuple(sequence.tokens(part.start, part.end)))
            pages.append(self._pool.step_pages(sequence, part.end))
        return StepBatch(plan.sequences, tuple(token_ids), tuple(pages))

    def _finish_step(self, plan: StepPlan, drawn: Sequence[SampledToken]) -> None:
        """What follows a step that was computed: tokens are delivered to all handlers in one go."""
        self._scheduler.complete(plan)
        sampling = [self._sequences[part.sequence] for part in plan.sequences if part.samples]
        for part in plan.sequences:
            self._finish_chunk(part)
        stored = [
            (sequence, sequence.computed) for p in plan.sequences if (sequence := self._sequences.get(p.sequence))
        ]
        for sequence, error in self._pool.finish_step(stored):
            self._end(self._sequences[sequence.id], error)
        for sequence, drawn_for_forks in self._for_forks:
            if sequence.id in self._sequences:
                self._prompts.keep(sequence, drawn_for_forks)
        scored = [(sequence.stream, part) for sequence, part in self._scored if sequence.id in self._sequences]
        tokens = [
            self._deliver(sequence, token)
            for sequence, token in zip(sampling, drawn, strict=True)
            if sequence.id in self._sequences
        ]
        self._loop.call_soon_threadsafe(_put_all, [*scored, *tokens])
        self.counters["steps"] += 1
        self.counters["graph_steps"] = self._runner.graph_steps
        self.counters["output_tokens"] += len(tokens)

    def _deliver(self, sequence: DecodeSequence, token: SampledToken) -> tuple[TokenStream, Token]:
        """Notes a drawn token; ends the request where it is the last one."""
        if not sequence.output:
            sequence.timing.sampled_s, sequence.timing.sampled_unix_ns = time.monotonic(), time.time_ns()
        sequence.output.append(token.token_id)
        eos, context = self._model.eos_token_ids, self._model.context_length
        finish = sequence.finish_reason(token.token_id, len(sequence.output), eos, context)
        if finish is not None:
            self._finish(sequence)
        return sequence.stream, Token(token.token_id, token.logprobs_pb(), finish)

    def _finish(self, sequence: DecodeSequence) -> None:
        """Leaves the pages of a complete answer for the conversation's next turn."""
        with contextlib.suppress(IsthmusError):  # pages that cannot be packed are not kept
            self._pool.finalize(sequence)
        self._remove(sequence)

    def _measure(self, plan: StepPlan, pages: int, seconds: float) -> None:
        """Steps that are all of one kind are measured for the router."""
        if all(part.tokens == 1 for part in plan.sequences):
            self.rates.add_step(len(plan.sequences), pages, seconds)
        elif all(part.in_prompt for part in plan.sequences):
            self.rates.add_prefill([(part.start, part.end) for part in plan.sequences], seconds)

    def _finish_chunk(self, part: SequencePlan) -> None:
        sequence = self._sequences[part.sequence]
        sequence.computed = part.end
        if failure := self._runner.prompt_failure(sequence.id):
            self._end(sequence, failure)
        if part.end >= part.prompt_tokens:
            self._runner.close_prompt(sequence.id)

    def _end(self, sequence: DecodeSequence, error: IsthmusError) -> None:
        """Ends a request with an error; the others go on."""
        self._remove(sequence)
        self._loop.call_soon_threadsafe(sequence.stream.put, error)

    def _fail(self, error: BaseException) -> None:
        self.failure = f"the decode engine failed: {type(error).__name__}: {without_paths(str(error))}"
        failed = [sequence for sequence in self._in_step if sequence.id in self._sequences]
        for sequence in list(self._sequences.values()):
            ended = EngineFailed(self.failure, len(failed)) if sequence in failed else Unavailable(self.failure)
            self._loop.call_soon_threadsafe(sequence.stream.put, ended)
        self.inbox.close()
        self._on_failure(self.failure)

    @property
    def local_bytes(self) -> int:
        """Of prompts that are computed here, beside the pool."""
        return self._runner.local_bytes

    @property
    def fork_bytes(self) -> int:
        """Of prompts whose other answers have not begun, in host memory."""
        return self._prompts.nbytes

    def running(self) -> int:
        """Sequences that hold pages, in the pool or in host memory."""
        return self._scheduler.count(State.RECEIVING, State.RUNNING, State.PREEMPTED)


def _put_all(items: list[tuple[TokenStream, Token | ScoredTokens]]) -> None:
    for stream, item in items:
        stream.put(item)
