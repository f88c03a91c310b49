"""The prefill engine: takes prompts, computes them in chunks, sends pages and first tokens."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from ..kvtransfer.encoded import EncodedSection
from ..kvtransfer.page import Section
from ..kvtransfer.pool.dense import DensePool
from ..model.hidden import HiddenStates
from ..model.model import Model
from ..model.prompt_logprobs import score_chunk
from ..model.sampling import SampledToken, SampleRow, sample, sample_forks
from ..proto.errors import EngineFailed, Exhausted, Expired, IsthmusError, Unavailable, without_paths
from ..proto.prefill_pb2 import DrawnToken, FirstToken
from ..proto.priority import RESUMED_RANK
from ..worker.engine import EngineThread, is_out_of_memory
from ..worker.rates import Rates
from ..worker.step_plan import SequenceId, SequencePlan, StepBatch, StepPlan
from .job import PrefillJob
from .prefix import PrefixCache
from .runner import PrefillRunner
from .scheduler import PrefillScheduler

log = logging.getLogger(__name__)

INTERRUPTIONS = 4  # of one step, each a step of its own: what ends jobs, and the worker, waits for the end of that one


class PrefillEngine:
    """Owns the model, the pool and the jobs; its thread alone touches them. `submit` and `drop` are for others.

    Page ownership: a job gets its pages of the pool with its first chunk and returns them with its first token or at
    its `drop`, whichever is first. What it sends lies in host pages, which it pins until its `drop`.
    """

    def __init__(
        self,
        model: Model,
        pool: DensePool,
        prefixes: PrefixCache,
        scheduler: PrefillScheduler,
        on_failure: Callable[[str], None],
    ) -> None:
        self._model, self._pool, self._prefixes, self._scheduler = model, pool, prefixes, scheduler
        self._on_failure = on_failure
        self._runner = PrefillRunner(model, pool, self._between_layers)
        self._jobs: dict[SequenceId, PrefillJob] = {}
        self._resuming: deque[PrefillJob] = deque()  # submitted, and not heard of by the engine thread
        self._in_step: list[PrefillJob] = []  # whom a failure of the engine now is put down to
        self._may_interrupt = 0  # how many more steps may come between the layers of the one in work
        self.counters: Counter[str] = Counter()
        self.rates = Rates()
        self.failure: str | None = None
        self.thread = EngineThread("prefill-engine", self._step, self._fail)

    @property
    def active(self) -> int:
        """Jobs that are queued or in work."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Jobs whose first chunk has not begun."""
        return sum(job.started_s is None for job in list(self._jobs.values()))

    def submit(self, job: PrefillJob) -> None:
        """Queues a job; what comes of it goes to its outbox.

        One that resumes an answer interrupts the step in work, which may take a CPU a second or more.
        """
        if job.rank == RESUMED_RANK:
            self._resuming.append(job)
            self.thread.post(self._add_resuming)
        else:
            self.thread.post(lambda: self._add(job))

    def drop(self, job: PrefillJob) -> None:
        """Ends a job at any point of its life and frees what it holds. Called once, when its call ends."""
        self.thread.post(lambda: self._drop(job))

    def _add(self, job: PrefillJob) -> None:
        if self.failure:
            job.outbox.fail(Unavailable(self.failure))
            return
        self._jobs[job.id] = job
        self._scheduler.add_request(
            *(job.id, len(job.token_ids), time.monotonic()),
            cached=self._prefixes.guess(job),
            rank=job.rank,
            deadline_s=job.deadline_s,
            alone=job.alone,
        )

    def _add_resuming(self) -> None:
        while self._resuming:
            self._add(self._resuming.popleft())

    def _drop(self, job: PrefillJob) -> None:
        self._remove(job)
        self._prefixes.unpin_pages(job)

    def _remove(self, job: PrefillJob) -> None:
        self._scheduler.remove_request(job.id)
        if self._jobs.pop(job.id, None):
            self._prefixes.free_pages(job)
        if not self._jobs:
            assert not self._prefixes.table.in_use, "pages are in use with no job"

    def _step(self) -> bool:
        now_s = time.monotonic()
        for job in self._scheduler.expired(now_s):
            self._end(self._jobs[job], Expired("the deadline passed before the prompt was computed"))
        return self._compute(self._scheduler.plan(now_s, self.rates.tokens_per_s, self._allocate))

    def _between_layers(self) -> None:
        """A sign that the step goes on; computes prompts of answers that resume and came during a step of others."""
        self.thread.begin_part()
        if self._resuming and self._may_interrupt:
            self._add_resuming()
            left = self._may_interrupt
            while left and self._compute(self._scheduler.plan_resuming(self._allocate)):
                left -= 1
            self._may_interrupt = left

    def _compute(self, plan: StepPlan) -> bool:
        """One step; whether there was anything to compute."""
        if not plan:
            return False
        interruptible = all(self._jobs[part.sequence].rank > RESUMED_RANK for part in plan.sequences)
        self._may_interrupt = may_interrupt = INTERRUPTIONS if interruptible else 0
        started_s = time.monotonic()
        if self._run(plan) and self._may_interrupt == may_interrupt:
            self.rates.add_prefill([(part.start, part.end) for part in plan.sequences], time.monotonic() - started_s)
        return True

    def _run(self, plan: StepPlan) -> bool:
        """Computes a plan, or two halves of it where there is no memory for all; whether it was done in one go.

        A single prompt that there is no memory for ends its job.
        """
        jobs = [self._jobs[part.sequence] for part in plan.sequences]
        interrupted, self._in_step = self._in_step, jobs
        with self.thread.computing(plan.tokens):
            drawn = self._draw(plan, jobs)
            if drawn is not None:
                self.counters["prompt_tokens"] += plan.tokens
                parts = list(zip(jobs, plan.sequences, strict=True))
                for job, part in parts:
                    self._finish_chunk(job, part)
                self._finish_prompts([job for job, part in parts if part.samples], drawn)
        self._in_step = interrupted
        if drawn is not None:
            return True
        self.counters["out_of_memory"] += 1
        if half := len(jobs) // 2:
            self._run(StepPlan(plan.sequences[:half]))
            self._run(StepPlan(plan.sequences[half:]))
        else:
            self._end(jobs[0], Exhausted(f"no memory here for a step of {plan.tokens} tokens of one prompt"))
        return False

    def _draw(self, plan: StepPlan, jobs: Sequence[PrefillJob]) -> list[SampledToken] | None:
        """The first tokens of the prompts that are complete now, in order; None where there is no memory for the step.

        What a step that failed for that has written, and sent, is as it will be when it is made again.
        """
        parts = list(zip(jobs, plan.sequences, strict=True))
        done = [job for job, part in parts if part.samples]
        due = [job.begin_chunk(part.end) for job, part in parts]
        token_ids = tuple(tuple(job.token_ids[part.start : part.end]) for job, part in parts)
        batch = StepBatch(plan.sequences, token_ids, tuple(job.pages for job in jobs))
        eos = self._model.eos_token_ids

        def send(layer: int) -> None:
            for job, sections in zip(jobs, due, strict=True):
                self._send_layer(job, layer, sections)

        def score(hidden: HiddenStates, rows: Sequence[int]) -> None:
            for (job, part), row in zip(parts, rows, strict=True):
                if (top := job.sampling.prompt_logprobs) is not None:
                    self.thread.begin_part()
                    job.scored = score_chunk(
                        *(hidden, row, job.token_ids, part.start, part.end, top, self._model.vocab_size)
                    )

        scores = any(job.prompt.is_scored for job in jobs)
        try:
            logits_RV = self._runner.run(batch, send, score if scores else None)
            rows = [SampleRow(job.sampling, job.token_ids, [], eos) for job in done]
            for index, job in enumerate(done):
                job.drawn_for_forks = sample_forks(logits_RV[index], rows[index], job.forks) if job.forks else ()
            return sample(logits_RV, rows) if done else []
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("no memory for a step", extra={"fields": {"prompts": len(jobs), "why": str(error)}})
            return None

    def _send_layer(self, job: PrefillJob, layer: int, due: Sequence[Section]) -> None:
        """Encodes and queues a layer of a chunk. A page that cannot be encoded ends its own job only (`job.failure`).

        A chunk that is computed once more sends no layer twice.
        """
        if layer < job.layers_sent:
            return
        encoded: list[EncodedSection] = []
        try:
            for section in due if job.failure is None else []:
                keys, values = self._pool.read(layer, job.runs, section.start, section.end)
                encoded.append(job.sender.encode(layer, section, keys, values))
            job.outbox.put(encoded)
            job.layers_sent = layer + 1
        except IsthmusError as error:
            job.failure = error

    def _allocate(self, sequence: SequenceId) -> int | None:
        job = self._jobs[sequence]
        interrupted, self._in_step = self._in_step, [job]
        with self.thread.computing(len(job.token_ids), measured=False):
            cached = self._prefixes.allocate(job)
        self._in_step = interrupted
        if cached is not None:
            job.started_s = time.monotonic()
            self.counters["cached_tokens"] += job.cached_tokens
            self.counters["stored_tokens"] += job.stored_tokens
        return cached

    def _finish_chunk(self, job: PrefillJob, part: SequencePlan) -> None:
        """Keeps the pages that are complete now; ends a job that failed."""
        job.due = None
        if job.failure is not None:
            self.counters["prompts_failed"] += 1
            self._end(job, job.failure)
        else:
            if job.scored is not None:
                job.outbox.put_scored(job.scored)
                job.scored = None
            self._prefixes.store_computed(job, part.start, part.end)
            job.outbox.put((), flush=True)

    def _finish_prompts(self, done: Sequence[PrefillJob], tokens: Sequence[SampledToken]) -> None:
        """Sends the first tokens, which overtake all waiting frames; the commits follow the last of these."""
        sampled_s, sampled_ns = time.monotonic(), time.time_ns()
        for job, token in zip(done, tokens, strict=True):
            if job.failure:
                continue
            written = job.outbox.written_bytes
            job.outbox.put_first(
                FirstToken(
                    token_id=token.token_id,
                    sampled_unix_ns=sampled_ns,
                    logprobs=token.logprobs_pb(),
                    of_forks=[
                        DrawnToken(token_id=own.token_id, logprobs=own.logprobs_pb()) for own in job.drawn_for_forks
                    ],
                )
            )
            self._remove(job)
            self.counters["prompts"] += 1
            job.outbox.close(job.stats(sampled_unix_ns=sampled_ns, sampled_s=sampled_s, written_before=written))

    def _end(self, job: PrefillJob, error: IsthmusError) -> None:
        job.outbox.fail(error)
        self._remove(job)

    def _fail(self, error: BaseException) -> None:
        self.failure = f"the prefill engine failed: {type(error).__name__}: {without_paths(str(error))}"
        failed = [job for job in self._in_step if job.id in self._jobs]
        for job in list(self._jobs.values()):
            job.outbox.fail(EngineFailed(self.failure, len(failed)) if job in failed else Unavailable(self.failure))
        self._on_failure(self.failure)
