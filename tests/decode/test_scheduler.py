import pytest

from isthmus.decode.page_manager import check_fits
from isthmus.decode.scheduler import AGEING_S, DecodeScheduler, State
from isthmus.proto.errors import Exhausted, InvalidRequest
from isthmus.worker.step_plan import SequenceId

A, B, C = SequenceId(1), SequenceId(2), SequenceId(3)


def scheduler(**changes: int) -> DecodeScheduler:
    sizes = {"total_pages": 10, "page_tokens": 64, "max_batch": 8}
    return DecodeScheduler(**sizes | {"chunk_tokens": 128, "idle_chunk_tokens": 256, "raw_tokens": 1000} | changes)


def add(
    plan: DecodeScheduler, sequence: SequenceId, tokens: int = 10, rank: int = 1, arrived_s: float = 0, most: int = 0
) -> None:
    plan.add_request(sequence, prompt_tokens=tokens, max_tokens=max(tokens, most), rank=rank, arrived_s=arrived_s)


def test_first_come_first_served_within_a_class():
    plan = scheduler()
    add(plan, B, 300, arrived_s=2)
    add(plan, A, 100, arrived_s=1)
    add(plan, C, 10, arrived_s=3)
    assert plan.queue() == [A, B, C]
    plan.mark_allocated(A)
    assert plan.queue() == [B, C] and plan.waiting_tokens == 310


def test_priority_goes_first_until_others_have_waited_long_enough():
    plan = scheduler()
    add(plan, A, rank=2)
    add(plan, B, rank=0, arrived_s=2 * AGEING_S - 1)
    add(plan, C, rank=0, arrived_s=2 * AGEING_S + 1)
    assert plan.queue() == [B, A, C]


def test_a_request_joins_and_leaves_the_batch_between_steps():
    plan = scheduler()
    for sequence in (A, B):
        add(plan, sequence)
        plan.mark_allocated(sequence)
    assert plan.batch() == []
    plan.mark_running(B, computed=10, known=11)
    assert plan.batch() == [B]
    plan.mark_running(A, computed=10, known=11)
    assert plan.batch() == [A, B]
    plan.remove_request(B)
    assert plan.batch() == [A]


def test_the_batch_has_a_limit():
    plan = scheduler(max_batch=1)
    add(plan, A)
    add(plan, B)
    assert plan.has_slot()
    plan.mark_allocated(A)
    assert not plan.has_slot()
    plan.remove_request(A)
    assert plan.has_slot()


def test_refuses_what_can_never_fit_and_what_nobody_has_room_to_wait_for():
    with pytest.raises(InvalidRequest, match="come to 641; this worker holds at most 640"):
        check_fits(641, room=640, waiting=0, max_waiting=2)
    check_fits(640, room=640, waiting=1, max_waiting=2)
    with pytest.raises(Exhausted, match="2 requests wait here already"):
        check_fits(1, room=640, waiting=2, max_waiting=2)


def test_only_legal_transitions():
    plan = scheduler()
    add(plan, A)
    with pytest.raises(AssertionError, match=r"WAITING to State\.RUNNING"):
        plan.mark_running(A, computed=10, known=11)
    assert plan.count(State.WAITING) == 1


def run(plan: DecodeScheduler, *sequences: SequenceId) -> None:
    for sequence in sequences:
        plan.mark_allocated(sequence)
        plan.mark_running(sequence, computed=10, known=11)


def test_the_lowest_class_and_of_that_the_youngest_makes_room():
    plan = scheduler()
    add(plan, A, rank=2, arrived_s=0)
    add(plan, B, rank=1, arrived_s=1)
    add(plan, C, rank=1, arrived_s=2)
    run(plan, A, B, C)
    assert plan.victims() == [A, C, B]
    urgent = SequenceId(4)
    add(plan, urgent, rank=1, arrived_s=5)
    assert plan.victims(of=urgent) == [A], "only a lower class makes room for a request that is not running yet"
    plan.mark_preempted(A)
    assert plan.batch() == [B, C] and plan.queue() == [urgent, A]
    assert plan.has_slot() and plan.victims() == [C, B]
    plan.mark_allocated(A)
    assert plan.state(A) is State.RUNNING


def test_nobody_of_a_lower_class_makes_room_once_it_has_waited_longer():
    plan = scheduler()
    add(plan, A, rank=2, arrived_s=0)
    run(plan, A)
    add(plan, B, rank=0, arrived_s=2 * AGEING_S + 1)
    assert plan.victims(of=B) == []


def test_no_more_is_promised_than_pool_and_host_memory_hold():
    plan = scheduler(host_pages=12)
    for sequence in (A, B, C):
        add(plan, sequence, most=8 * 64)
    assert plan.is_promised(A)
    plan.mark_allocated(A)
    assert not plan.is_promised(B), "16 pages, of 10 in the pool and 12 in host memory less 8 that must stay free"
    plan.remove_request(A)
    plan = scheduler(host_pages=14)
    for sequence in (A, B, C):
        add(plan, sequence, most=8 * 64)
    plan.mark_allocated(A)
    assert plan.is_promised(B)
    run_only = scheduler()
    add(run_only, A, most=6 * 64)
    add(run_only, B, most=4 * 64)
    add(run_only, C, most=5 * 64)
    run_only.mark_allocated(A)
    assert run_only.is_promised(B) and not run_only.is_promised(C), "without host memory all pages must be there"


def test_what_a_saved_request_takes_beyond_its_pages_counts():
    plan = scheduler(host_pages=14, saved_extra_pages=1)
    for sequence in (A, B):
        add(plan, sequence, most=8 * 64)
    plan.mark_allocated(A)
    assert not plan.is_promised(B)
