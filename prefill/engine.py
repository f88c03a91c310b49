"""The prefill engine: takes prompts, computes them in chunks, sends pages and first tokens."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from ..kvtransfer.pool.dense import DensePool
from ..model.model import Model
from ..model.sampling import SampledToken, SampleRow, sample
from ..proto.errors import EngineFailed, Exhausted, Expired, IsthmusError, Unavailable, without_paths
from ..proto.prefill_pb2 import FirstToken
from ..proto.priority import RESUMED_RANK
from ..worker.engine import EngineThread
from ..worker.out_of_memory import is_out_of_memory
from ..worker.rates import Rates
from .job import PrefillJob
from .prefix import PrefixCache
from .runner import PrefillRunner
from .scheduler import Chunk, JobId, PrefillScheduler

log = logging.getLogger(__name__)

INTERRUPTIONS = 4  # of one step, each a step of its own: what ends jobs, and the worker, waits for the end of that one


class PrefillEngine:
    """Owns the model, the pool and the jobs; its thread alone touches them. `submit` and `drop` are for others.

    Page ownership: a job gets its pages of the pool with its first chunk and returns them with its first token or its
    drop, whichever is first. What it sends lies in host pages, which it pins until its drop.
    """

    def __init__(
        self,
        model: Model,
        pool: DensePool,
        prefixes: PrefixCache,
        scheduler: PrefillScheduler,
        on_failure: Callable[[str], None],
    ) -> None:
        self._model, self._prefixes, self._scheduler = model, prefixes, scheduler
        self._on_failure = on_failure
        self._runner = PrefillRunner(model, pool, self._between_layers)
        self._jobs: dict[JobId, PrefillJob] = {}
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
        self._scheduler.add(
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
        self._prefixes.unpin(job)

    def _remove(self, job: PrefillJob) -> None:
        self._scheduler.remove(job.id)
        if self._jobs.pop(job.id, None):
            self._prefixes.release(job)
        if not self._jobs:
            assert not self._prefixes.table.in_use, "pages are in use with no job"

    def _step(self) -> bool:
        now_s = time.monotonic()
        for job in self._scheduler.expired(now_s):
            self._end(self._jobs[job], Expired("the deadline passed before the prompt was computed"))
        return self._compute(self._scheduler.plan(now_s, self.rates.tokens_per_s, self._admit))

    def _between_layers(self) -> None:
        """A sign that the step goes on; computes prompts of answers that resume and came during a step of others."""
        self.thread.reach_part()
        if self._resuming and self._may_interrupt:
            self._add_resuming()
            left = self._may_interrupt
            while left and self._compute(self._scheduler.plan_resuming(self._admit)):
                left -= 1
            self._may_interrupt = left

    def _compute(self, chunks: Sequence[Chunk]) -> bool:
        """One step of these chunks; whether there were any."""
        work = [(self._jobs[chunk.job], chunk) for chunk in chunks]
        if not work:
            return False
        interruptible = all(job.rank > RESUMED_RANK for job, _ in work)
        self._may_interrupt = may_interrupt = INTERRUPTIONS if interruptible else 0
        started_s = time.monotonic()
        if self._advance(work) and self._may_interrupt == may_interrupt:
            self.rates.computed([(chunk.start, chunk.end) for chunk in chunks], time.monotonic() - started_s)
        return True

    def _advance(self, work: Sequence[tuple[PrefillJob, Chunk]]) -> bool:
        """Computes chunks, or two halves of them where there is no memory for all; whether it was done in one go.

        A single one that there is no memory for ends its job.
        """
        interrupted, self._in_step = self._in_step, [job for job, _ in work]
        tokens = sum(chunk.end - chunk.start for _, chunk in work)
        with self.thread.computing(tokens):
            drawn = self._run(work)
            if drawn is not None:
                self.counters["prompt_tokens"] += tokens
                self._finish_chunks(work)
                self._finish_prompts([job for job, chunk in work if chunk.last], drawn)
        self._in_step = interrupted
        if drawn is not None:
            return True
        self.counters["out_of_memory"] += 1
        if len(work) > 1:
            self._advance(work[: len(work) // 2])
            self._advance(work[len(work) // 2 :])
        else:
            self._end(work[0][0], Exhausted(f"no memory here for a step of {tokens} tokens of one prompt"))
        return False

    def _run(self, work: Sequence[tuple[PrefillJob, Chunk]]) -> list[SampledToken] | None:
        """The first tokens of the prompts that are complete now, in order; None where there is no memory for the step.

        What a step that failed for that has written, and sent, is as it will be when it is made again.
        """
        done = [job for job, chunk in work if chunk.last]
        eos = self._model.eos_token_ids
        try:
            logits_RV = self._runner.run(work)
            return sample(logits_RV, [SampleRow(job.sampling, job.token_ids, [], eos) for job in done]) if done else []
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("no memory for a step", extra={"fields": {"prompts": len(work), "why": str(error)}})
            return None

    def _admit(self, job_id: JobId) -> int | None:
        job = self._jobs[job_id]
        interrupted, self._in_step = self._in_step, [job]
        with self.thread.computing(len(job.token_ids), measured=False):
            cached = self._prefixes.admit(job)
        self._in_step = interrupted
        if cached is not None:
            job.started_s = time.monotonic()
            self.counters["cached_tokens"] += job.cached_tokens
            self.counters["stored_tokens"] += job.stored_tokens
        return cached

    def _finish_chunks(self, work: Sequence[tuple[PrefillJob, Chunk]]) -> None:
        """Keeps the pages that are complete now; ends jobs that failed."""
        for job, chunk in work:
            job.due = None
            if job.failure is not None:
                self.counters["prompts_failed"] += 1
                self._end(job, job.failure)
            else:
                self._prefixes.keep(job, chunk.start, chunk.end)
                job.outbox.put((), flush=True)

    def _finish_prompts(self, done: Sequence[PrefillJob], tokens: Sequence[SampledToken]) -> None:
        """Sends the first tokens, which overtake all waiting frames; the commits follow the last of these."""
        sampled_s, sampled_ns = time.monotonic(), time.time_ns()
        for job, token in zip(done, tokens, strict=True):
            if job.failure:
                continue
            written = job.outbox.written_bytes
            job.outbox.put_first(
                FirstToken(token_id=token.token_id, sampled_unix_ns=sampled_ns, logprobs=token.logprobs_pb())
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
            told = EngineFailed(self.failure, len(failed)) if job in failed else Unavailable(self.failure)
            job.outbox.fail(told)
        self._on_failure(self.failure)
