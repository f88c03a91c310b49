import pytest

from isthmus.decode.scheduler import DecodeScheduler, SequenceId, State
from isthmus.proto.errors import Exhausted, InvalidRequest

A, B, C = SequenceId(1), SequenceId(2), SequenceId(3)


def scheduler(**changes: int) -> DecodeScheduler:
    return DecodeScheduler(**{"total_pages": 10, "page_tokens": 64, "max_batch": 8, "max_waiting": 2} | changes)


def test_admits_in_order_with_pages_for_everything_a_request_can_hold():
    plan = scheduler()
    plan.add(A, 100, 129)
    plan.add(B, 300, 8 * 64)
    plan.add(C, 10, 20)
    assert plan.admit(free_pages=10) == [(A, 3)], "B does not fit yet and C does not overtake it"
    assert plan.waiting_tokens == 310
    plan.remove(A)
    assert plan.admit(free_pages=10) == [(B, 8), (C, 1)]


def test_a_request_joins_and_leaves_the_batch_between_steps():
    plan = scheduler()
    for sequence in (A, B):
        plan.add(sequence, 10, 20)
    plan.admit(10)
    assert plan.batch() == []
    plan.run(B)
    assert plan.batch() == [B]
    plan.run(A)
    assert plan.batch() == [A, B]
    plan.remove(B)
    assert plan.batch() == [A]


def test_the_batch_has_a_limit():
    plan = scheduler(max_batch=1)
    plan.add(A, 1, 2)
    plan.add(B, 1, 2)
    assert plan.admit(10) == [(A, 1)]
    assert plan.admit(9) == []


def test_refuses_what_can_never_fit_and_what_nobody_has_room_to_wait_for():
    plan = scheduler()
    with pytest.raises(InvalidRequest, match="come to 641; this worker holds at most 640"):
        plan.check_fits(641, waiting=0)
    plan.check_fits(640, waiting=1)
    with pytest.raises(Exhausted, match="2 requests wait here already"):
        plan.check_fits(1, waiting=2)


def test_only_legal_transitions():
    plan = scheduler()
    plan.add(A, 1, 2)
    with pytest.raises(AssertionError, match=r"WAITING to State\.RUNNING"):
        plan.run(A)
    assert plan.count(State.WAITING) == 1
