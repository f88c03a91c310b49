import random
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from isthmus.prefill.scheduler import AllocatePages, PrefillScheduler
from isthmus.proto.common_pb2 import Priority
from isthmus.proto.priority import RESUMED_RANK, rank_of
from isthmus.worker.step_plan import SequenceId, StepPlan

A, B, C = SequenceId(1), SequenceId(2), SequenceId(3)
INTERACTIVE, STANDARD, BATCH = (
    rank_of(priority)
    for priority in (Priority.PRIORITY_INTERACTIVE, Priority.PRIORITY_STANDARD, Priority.PRIORITY_BATCH)
)
CHUNK, PAGE, RATE = 256, 64, 1000.0


class Chunk(NamedTuple):
    """What is planned of one prompt; `last` completes it."""

    job: SequenceId
    start: int
    end: int
    last: bool


def chunks_of(step: StepPlan) -> list[Chunk]:
    return [Chunk(plan.sequence, plan.start, plan.end, plan.samples) for plan in step.sequences]


def scheduler(chunk_tokens: int = CHUNK) -> PrefillScheduler:
    return PrefillScheduler(chunk_tokens=chunk_tokens, page_tokens=PAGE, ageing_tokens_per_s=100)


def everything(job: SequenceId) -> int:
    return 0


def pages_for(lengths: Mapping[SequenceId, int], free: int) -> AllocatePages:
    """Gives prompts pages as long as there are some."""
    left = free

    def allocate(job: SequenceId) -> int | None:
        nonlocal left
        pages = -(-lengths[job] // PAGE)
        if pages > left:
            return None
        left -= pages
        return 0

    return allocate


def test_chunks_end_on_pages_and_the_last_one_at_the_prompt():
    plan = scheduler()
    plan.add_request(A, 600, now_s=0)
    chunks = [chunks_of(plan.plan(0, RATE, everything)) for _ in range(4)]
    assert chunks == [[Chunk(A, 0, 256, False)], [Chunk(A, 256, 512, False)], [Chunk(A, 512, 600, True)], []]


def test_a_long_prompt_delays_a_short_one_by_the_chunk_in_work():
    plan = scheduler()
    plan.add_request(A, 2000, now_s=0)
    assert chunks_of(plan.plan(0, RATE, everything)) == [Chunk(A, 0, 256, False)]
    plan.add_request(B, 100, now_s=0)
    assert chunks_of(plan.plan(0, RATE, everything)) == [Chunk(B, 0, 100, True), Chunk(A, 256, 384, False)]


def test_several_prompts_share_a_step():
    plan = scheduler()
    for job, tokens in ((A, 100), (B, 90), (C, 500)):
        plan.add_request(job, tokens, now_s=0)
    assert chunks_of(plan.plan(0, RATE, everything)) == [
        Chunk(B, 0, 90, True),
        Chunk(A, 0, 100, True),
        Chunk(C, 0, 64, False),
    ]


def test_who_has_waited_long_gets_a_quarter_of_each_step():
    plan = scheduler()
    plan.add_request(A, 2000, now_s=0)
    plan.add_request(B, 500, now_s=30)
    assert chunks_of(plan.plan(30, RATE, everything)) == [Chunk(A, 0, 64, False), Chunk(B, 0, 192, False)]


def test_what_is_cached_is_not_computed_and_counts_as_short():
    plan = scheduler()
    plan.add_request(A, 300, now_s=0)
    plan.add_request(B, 2000, now_s=0, cached=1984)
    assert plan.waiting_tokens == 316
    found = {A: 0, B: 1920}.get
    assert chunks_of(plan.plan(0, RATE, found)) == [Chunk(B, 1920, 2000, True), Chunk(A, 0, 128, False)]


def test_a_prompt_that_does_not_fit_blocks_those_behind_it_but_not_those_in_work():
    lengths = {A: 600, B: 320, C: 340}
    plan = scheduler()
    plan.add_request(A, 600, now_s=0)
    assert chunks_of(plan.plan(0, RATE, pages_for(lengths, 12))) == [Chunk(A, 0, 256, False)]
    plan.add_request(B, 320, now_s=0)
    plan.add_request(C, 340, now_s=0)
    assert chunks_of(plan.plan(0, RATE, pages_for(lengths, 2))) == [Chunk(A, 256, 512, False)]
    assert chunks_of(plan.plan(0, RATE, pages_for(lengths, 12)))[0] == Chunk(A, 512, 600, True)


def test_counts_what_is_not_computed_and_forgets_what_is_removed():
    plan = scheduler()
    plan.add_request(A, 300, now_s=0)
    plan.add_request(B, 300, now_s=0)
    chunks_of(plan.plan(0, RATE, everything))
    assert plan.waiting_tokens == 344
    plan.remove_request(A)
    assert plan.waiting_tokens == 300
    plan.remove_request(A)


def test_interactive_before_standard_and_batch_takes_what_is_left():
    plan = scheduler()
    plan.add_request(A, 64, now_s=0, rank=BATCH)
    plan.add_request(B, 300, now_s=0, rank=STANDARD)
    plan.add_request(C, 320, now_s=0, rank=INTERACTIVE)
    steps = [chunks_of(plan.plan(0, RATE, everything)) for _ in range(3)]
    assert steps == [
        [Chunk(B, 0, 64, False), Chunk(C, 0, 192, False)],  # a quarter for the one that is shorter for its wait
        [Chunk(C, 192, 320, True), Chunk(B, 64, 192, False)],
        [Chunk(B, 192, 300, True), Chunk(A, 0, 64, True)],
    ]


def test_an_answer_that_resumes_goes_first_and_shares_its_step_with_others_that_do_only():
    plan = scheduler()
    plan.add_request(A, 300, now_s=0, rank=INTERACTIVE)
    assert chunks_of(plan.plan(0, RATE, everything)) == [Chunk(A, 0, 256, False)]
    plan.add_request(B, 100, now_s=1, rank=RESUMED_RANK)
    plan.add_request(C, 64, now_s=1, rank=RESUMED_RANK)
    assert chunks_of(plan.plan(1, RATE, everything)) == [Chunk(C, 0, 64, True), Chunk(B, 0, 100, True)]
    assert chunks_of(plan.plan_resuming(everything)) == []
    assert chunks_of(plan.plan(1, RATE, everything)) == [Chunk(A, 256, 300, True)]


def test_who_is_in_work_goes_on_where_one_that_resumes_does_not_fit():
    plan = scheduler()
    plan.add_request(A, 500, now_s=0)
    assert chunks_of(plan.plan(0, RATE, everything)) == [Chunk(A, 0, 256, False)]
    plan.add_request(B, 100, now_s=0, rank=RESUMED_RANK)
    plan.add_request(C, 12, now_s=0)
    but_b = {A: 0, B: None, C: 0}.__getitem__
    assert chunks_of(plan.plan_resuming(but_b)) == []
    assert chunks_of(plan.plan(0, RATE, but_b)) == [Chunk(A, 256, 500, True)], (
        "nobody else takes the pages that B waits for"
    )


def test_batch_work_that_has_waited_long_still_yields():
    plan = scheduler()
    plan.add_request(A, 2000, now_s=0, rank=BATCH)
    plan.add_request(B, 500, now_s=1000, rank=STANDARD)
    assert chunks_of(plan.plan(1000, RATE, everything)) == [Chunk(B, 0, 256, False)]


def test_a_deadline_that_can_just_be_met_goes_first():
    plan = scheduler()
    plan.add_request(A, 300, now_s=0, deadline_s=100)
    plan.add_request(B, 600, now_s=0, deadline_s=0.9)
    plan.add_request(C, 5000, now_s=0, deadline_s=0.5)  # cannot be met: no reason to let others wait
    chunks = chunks_of(plan.plan(0, RATE, everything))
    assert chunks == [Chunk(A, 0, 64, False), Chunk(B, 0, 192, False)]
    assert plan.expired(0.4) == []
    assert plan.expired(0.5) == [C]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("chunk_tokens", [64, 256, 512])
def test_every_prompt_is_computed_once_in_order_within_the_budget(seed, chunk_tokens):
    rng = random.Random(seed)
    plan, now_s = scheduler(chunk_tokens), 0.0
    lengths = {SequenceId(number): rng.randint(1, 1500) for number in range(12)}
    cached = {job: rng.randrange(tokens) // PAGE * PAGE for job, tokens in lengths.items()}
    done, arriving = dict.fromkeys(lengths, 0), list(lengths)
    for _ in range(1000):
        if arriving and rng.random() < 0.5:
            job = arriving.pop()
            deadline = rng.choice([None, now_s + rng.random() * 20])
            plan.add_request(
                job, lengths[job], now_s, cached=rng.choice([0, cached[job]]), rank=job % 3, deadline_s=deadline
            )
        chunks = chunks_of(plan.plan(now_s, RATE, lambda job: done.update({job: cached[job]}) or cached[job]))
        assert sum(chunk.end - chunk.start for chunk in chunks) <= chunk_tokens
        assert len({chunk.job for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.start == done[chunk.job]
            assert chunk.last == (chunk.end == lengths[chunk.job])
            assert chunk.last or chunk.end % PAGE == 0
            done[chunk.job] = chunk.end
        now_s += 0.3
        if not chunks and not arriving:
            break
    assert done == lengths


@pytest.mark.parametrize("seed", range(20))
def test_long_prompts_never_delay_a_short_one_by_more_than_the_chunk_in_work(seed):
    """A prompt that fits in what the aged one leaves is complete after the first step that begins after its arrival."""
    rng = random.Random(seed)
    plan, now_s = scheduler(), 0.0
    for number in range(1, 6):
        plan.add_request(SequenceId(number), rng.randint(25_000, 60_000), now_s=0)  # none ends here
    for step in range(40):
        short = SequenceId(100 + step)
        chunks_of(plan.plan(now_s, RATE, everything))  # the chunk in work when it arrives
        plan.add_request(short, rng.randint(1, CHUNK * 3 // 4), now_s)
        now_s += 0.5
        assert [chunk.last for chunk in chunks_of(plan.plan(now_s, RATE, everything)) if chunk.job == short] == [True]
        plan.remove_request(short)
        now_s += 0.5


def test_a_prompt_that_is_alone_shares_its_steps_with_nobody():
    plan = scheduler()
    plan.add_request(A, 64, now_s=0)
    plan.add_request(B, 100, now_s=0, alone=True)
    plan.add_request(C, 128, now_s=0)
    steps = [chunks_of(plan.plan(0, RATE, everything)) for _ in range(4)]
    assert all(len(step) == 1 for step in steps if any(chunk.job == B for chunk in step))
    assert {chunk.job for step in steps for chunk in step if chunk.last} == {A, B, C}
    assert [chunk.job for step in steps for chunk in step].count(B) == 1


def test_a_long_prompt_that_is_alone_neither_starves_nor_starves_others():
    plan = scheduler()
    plan.add_request(A, 1000, now_s=0, alone=True)
    steps, done = 0, set[SequenceId]()
    while A not in done:
        short = SequenceId(10 + steps)
        plan.add_request(short, 64, now_s=steps)
        step = chunks_of(plan.plan(float(steps), RATE, everything))
        assert len({chunk.job for chunk in step}) == 1 or all(chunk.job != A for chunk in step)
        for chunk in step:
            if chunk.last:
                plan.remove_request(chunk.job)
                done.add(chunk.job)
        steps += 1
        assert steps < 40
    assert len(done) > steps // 2, "others went on meanwhile"
