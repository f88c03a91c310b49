from typing import NamedTuple

from isthmus.decode.step_selection import OPEN_PROMPTS, Progress, select_tokens, take_turns
from isthmus.proto.priority import BATCH_RANK
from isthmus.worker.step_plan import SequenceId, SequencePlan

A, B, C = SequenceId(1), SequenceId(2), SequenceId(3)


class Chunk(NamedTuple):
    """What is planned of one request."""

    sequence: SequenceId
    start: int
    end: int


def backlog(
    sequence: SequenceId,
    computed: int,
    known: int,
    prompt: int,
    *,
    rank: int = 1,
    waited_s: float = 0.0,
    opened: bool = False,
    raw_tokens: int = 0,
) -> Progress:
    return Progress(
        sequence=sequence,
        prompt_tokens=prompt,
        known=known,
        computed=computed,
        opened=opened,
        rank=rank,
        arrived_s=-waited_s,
        raw_tokens=raw_tokens,
    )


def chunks_of(plans: list[SequencePlan]) -> list[Chunk]:
    return [Chunk(plan.sequence, plan.start, plan.end) for plan in plans]


def plan(*requests: Progress, budget: int = 128, raw_tokens: int | None = None) -> list[Chunk]:
    plans = select_tokens(requests, now_s=0, page_tokens=64, budget=budget, raw_tokens=raw_tokens)
    known = {request.sequence: request.known for request in requests}
    assert all(plan.samples == (plan.end == known[plan.sequence]) for plan in plans)
    return chunks_of(plans)


def test_running_requests_step_whatever_the_budget():
    assert plan(backlog(A, 10, 11, 10), backlog(B, 700, 701, 5), budget=0) == [Chunk(A, 10, 11), Chunk(B, 700, 701)]


def test_a_prompt_is_cut_at_pages_and_ends_where_it_ends():
    assert plan(backlog(A, 0, 300, 300)) == [Chunk(A, 0, 128)]
    assert plan(backlog(A, 0, 100, 100)) == [Chunk(A, 0, 100)]
    assert plan(backlog(A, 256, 300, 300)) == [Chunk(A, 256, 300)]
    assert plan(backlog(A, 0, 300, 300), budget=100) == [Chunk(A, 0, 64)]
    assert plan(backlog(A, 0, 300, 300), budget=63) == [], "no chunk ends inside a page that goes on"
    assert plan(backlog(A, 0, 1, 1)) == [Chunk(A, 0, 1)], "a prompt of one token too"


def test_replayed_output_is_cut_where_pages_were_packed_the_first_time():
    assert plan(backlog(A, 100, 300, 100)) == [Chunk(A, 100, 128)]
    assert plan(backlog(A, 128, 300, 100)) == [Chunk(A, 128, 192)]
    assert plan(backlog(A, 256, 300, 100)) == [Chunk(A, 256, 300)]
    assert plan(backlog(A, 64, 300, 100)) == [Chunk(A, 64, 100)], "no chunk goes from the prompt into the output"


def test_the_shortest_goes_first_but_waiting_and_priority_count():
    long, short = backlog(A, 0, 1000, 1000), backlog(B, 0, 100, 100)
    assert plan(long, short) == [Chunk(B, 0, 100)]
    assert plan(long, short, budget=256) == [Chunk(B, 0, 100), Chunk(A, 0, 128)]
    assert plan(backlog(A, 0, 1000, 1000, waited_s=2.0), short) == [Chunk(A, 0, 128)]
    assert plan(backlog(A, 0, 1000, 1000, rank=0), short) == [Chunk(A, 0, 128)]


def test_only_so_many_prompts_are_open():
    opened = [backlog(SequenceId(n), 64, 900, 900, opened=True) for n in range(OPEN_PROMPTS)]
    new = backlog(SequenceId(99), 0, 64, 64)
    assert [chunk.sequence for chunk in plan(new, *opened)] == [SequenceId(0)]
    assert plan(new, *opened[1:])[0].sequence == SequenceId(99)


def test_prompts_wait_while_an_answer_that_has_begun_is_behind():
    running, new, begun = backlog(A, 9, 10, 9), backlog(B, 0, 20, 20), backlog(C, 64, 90, 60)
    assert plan(running, new, begun) == [Chunk(A, 9, 10), Chunk(C, 64, 90)]
    long, batch = backlog(C, 64, 600, 60), backlog(C, 64, 90, 60, rank=BATCH_RANK)
    assert plan(new, long) == [Chunk(C, 64, 128), Chunk(B, 0, 20)], "one that is far behind"
    assert plan(new, batch) == [Chunk(B, 0, 20), Chunk(C, 64, 90)], "batch work has no such claim"
    opened = [backlog(SequenceId(10 + n), 64, 900, 900, opened=True) for n in range(OPEN_PROMPTS)]
    own_prompt = backlog(C, 0, 61, 60)
    assert plan(own_prompt, *opened)[0].sequence == SequenceId(10), "it has no room to open: the others go on"


def test_a_prompt_begins_once_there_is_memory_for_it() -> None:
    opened = backlog(A, 64, 300, 300, opened=True, raw_tokens=300)
    long, short = backlog(B, 0, 200, 200, raw_tokens=200), backlog(C, 0, 250, 250, raw_tokens=60)
    assert plan(opened, long, short, budget=999, raw_tokens=500) == [Chunk(B, 0, 200), Chunk(A, 64, 300)]
    assert plan(opened, long, short, budget=999, raw_tokens=499) == [Chunk(A, 64, 300)], "nobody overtakes it for ever"
    assert plan(long, short, budget=999, raw_tokens=260) == [Chunk(B, 0, 200), Chunk(C, 0, 250)]
    pool_alone = backlog(C, 0, 150, 150)
    assert plan(opened, pool_alone, budget=999, raw_tokens=300) == [Chunk(C, 0, 150), Chunk(A, 64, 300)]


def test_who_is_alone_shares_no_step_and_takes_turns_with_the_others():
    a, b, c, d = (backlog(SequenceId(number), 10, 11, 10) for number in range(4))
    b.alone = d.alone = True
    assert take_turns([a, b, c, d], 0) == [[b], [d], [a, c]]
    assert take_turns([a, b, c, d], 1) == [[d], [a, c], [b]]
    assert take_turns([a, b, c, d], 5) == [[a, c], [b], [d]]
    assert take_turns([a, c], 3) == [[a, c]]
    assert take_turns([], 3) == []


def test_prompts_of_requests_in_other_steps_count_as_open():
    def chunks(open_elsewhere: int) -> list[Chunk]:
        prompt = backlog(A, 0, 64, 64)
        return chunks_of(select_tokens([prompt], now_s=0, page_tokens=64, budget=64, open_elsewhere=open_elsewhere))

    assert chunks(OPEN_PROMPTS) == []
    assert chunks(OPEN_PROMPTS - 1) == [Chunk(A, 0, 64)]
