from isthmus.prefill.scheduler import Chunk, JobId, PrefillScheduler

A, B, C = JobId(1), JobId(2), JobId(3)


def scheduler() -> PrefillScheduler:
    return PrefillScheduler(chunk_tokens=256, page_tokens=64, ageing_tokens_per_s=100)


def test_chunks_end_on_pages_and_the_last_one_at_the_prompt():
    plan = scheduler()
    plan.add(A, 600, now_s=0)
    chunks = [plan.plan(0, 100) for _ in range(4)]
    assert chunks == [[Chunk(A, 0, 256, False)], [Chunk(A, 256, 512, False)], [Chunk(A, 512, 600, True)], []]


def test_a_long_prompt_delays_a_short_one_by_one_chunk_at_most():
    plan = scheduler()
    plan.add(A, 2000, now_s=0)
    assert plan.plan(0, 100) == [Chunk(A, 0, 256, False)]
    plan.add(B, 100, now_s=0)
    assert plan.plan(0, 100) == [Chunk(B, 0, 100, True), Chunk(A, 256, 384, False)]


def test_several_prompts_share_a_step():
    plan = scheduler()
    for job, tokens in ((A, 100), (B, 90), (C, 500)):
        plan.add(job, tokens, now_s=0)
    assert plan.plan(0, 100) == [Chunk(B, 0, 90, True), Chunk(A, 0, 100, True), Chunk(C, 0, 64, False)]


def test_waiting_wins_in_the_end():
    plan = scheduler()
    plan.add(A, 2000, now_s=0)
    plan.add(B, 100, now_s=20)
    assert plan.plan(20, 100)[0].job == A


def test_a_prompt_that_does_not_fit_blocks_those_behind_it_but_not_those_in_work():
    plan = scheduler()
    plan.add(A, 600, now_s=0)
    assert plan.plan(0, free_pages=12) == [Chunk(A, 0, 256, False)]
    plan.add(B, 320, now_s=0)
    plan.add(C, 340, now_s=0)
    assert plan.plan(0, free_pages=2) == [Chunk(A, 256, 512, False)]
    assert plan.plan(0, free_pages=12)[0] == Chunk(A, 512, 600, True)


def test_counts_what_is_not_computed_and_forgets_what_is_removed():
    plan = scheduler()
    plan.add(A, 300, now_s=0)
    plan.add(B, 300, now_s=0)
    plan.plan(0, 100)
    assert plan.waiting_tokens == 344
    plan.remove(A)
    assert plan.waiting_tokens == 300
    plan.remove(A)
