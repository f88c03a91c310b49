"""The prefill engine: takes prompts, computes them in chunks, sends pages and first tokens."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from ..kvtransfer.pool import DensePool
from ..model.engine import EngineThread
from ..model.model import Model
from ..model.rates import Rates
from ..model.sampling import SampleRow, sample
from ..proto.errors import Unavailable
from ..proto.prefill_pb2 import FirstToken, PrefillEvent
from .job import PrefillJob
from .runner import PrefillRunner
from .scheduler import Chunk, JobId, PrefillScheduler


class PrefillEngine:
    """Owns the model, the pool and the jobs; its thread alone touches them. `submit` and `drop` are for others.

    Page ownership: a job gets its pages with its first chunk and returns them with its first token or its drop,
    whichever is first; frames hold copies.
    """

    def __init__(
        self, model: Model, pool: DensePool, scheduler: PrefillScheduler, on_failure: Callable[[str], None]
    ) -> None:
        self._model, self._pool, self._scheduler = model, pool, scheduler
        self._on_failure = on_failure
        self._runner = PrefillRunner(model, pool)
        self._jobs: dict[JobId, PrefillJob] = {}
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
        """Queues a job; what comes of it goes to its outbox."""
        self.thread.post(lambda: self._add(job))

    def drop(self, job: PrefillJob) -> None:
        """Ends a job at any point of its life and frees what it holds; harmless after its end."""
        self.thread.post(lambda: self._remove(job))

    def _add(self, job: PrefillJob) -> None:
        if self.failure:
            job.outbox.fail(Unavailable(self.failure))
            return
        self._jobs[job.id] = job
        self._scheduler.add(job.id, len(job.token_ids), time.monotonic())

    def _remove(self, job: PrefillJob) -> None:
        self._scheduler.remove(job.id)
        if self._jobs.pop(job.id, None):
            self._pool.allocator.give_back(job.runs)
            job.runs = ()
        if not self._jobs:
            assert not self._pool.allocator.in_use, "pages are in use with no job"

    def _step(self) -> bool:
        chunks = self._scheduler.plan(time.monotonic(), self._pool.allocator.free)
        work = [(self._jobs[chunk.job], chunk) for chunk in chunks]
        for job, chunk in work:
            if not chunk.start:
                self._begin(job)
        if not work:
            return False
        started_s = time.monotonic()
        logits_RV = self._runner.run(work)
        self._drop_failed(work)
        self._finish_prompts([job for job, chunk in work if chunk.last], logits_RV)
        for job, chunk in work:
            if not chunk.last:
                job.put_frames(job.sender.flush())
        self.counters["prompt_tokens"] += sum(chunk.end - chunk.start for chunk in chunks)
        self.rates.computed([(chunk.start, chunk.end) for chunk in chunks], time.monotonic() - started_s)
        return True

    def _begin(self, job: PrefillJob) -> None:
        runs = self._pool.allocator.take(self._pool.pages_for(len(job.token_ids)))
        assert runs is not None, "the scheduler admitted a prompt that does not fit"
        job.runs, job.started_s = runs, time.monotonic()

    def _finish_prompts(self, done: list[PrefillJob], logits_RV: Tensor) -> None:
        """Samples the first tokens and sends them ahead of all waiting frames; then the tails and the commits."""
        if not done:
            return
        eos = self._model.eos_token_ids
        tokens = sample(logits_RV, [SampleRow(job.sampling, job.token_ids, [], eos) for job in done])
        sampled_s, sampled_ns = time.monotonic(), time.time_ns()
        written = [job.outbox.written_bytes for job in done]
        for job, token in zip(done, tokens, strict=True):
            if job.failure:
                continue
            first = FirstToken(token_id=token.token_id, sampled_unix_ns=sampled_ns, logprobs=token.logprobs_pb())
            job.outbox.put([PrefillEvent(first_token=first)], urgent=True)
        for job, written_before in zip(done, written, strict=True):
            if job.failure:
                continue
            job.put_frames(job.sender.flush())
            commit = job.sender.commit()
            commit.stats.CopyFrom(
                job.stats(
                    sampled_unix_ns=sampled_ns,
                    sampled_s=sampled_s,
                    written_before=written_before,
                )
            )
            job.outbox.put([PrefillEvent(commit=commit)])
            self._remove(job)
            self.counters["prompts"] += 1

    def _drop_failed(self, work: Sequence[tuple[PrefillJob, Chunk]]) -> None:
        for job, _ in work:
            if job.failure is not None:
                self.counters["prompts_failed"] += 1
                job.outbox.fail(job.failure)
                self._remove(job)

    def _fail(self, error: BaseException) -> None:
        self.failure = f"the prefill engine failed: {type(error).__name__}: {error}"
        for job in list(self._jobs.values()):
            job.outbox.fail(Unavailable(self.failure))
        self._on_failure(self.failure)
