import pytest

from isthmus.decode.scheduler import AGEING_S, DecodeScheduler, SequenceId, State
from isthmus.proto.errors import Exhausted, InvalidRequest

A, B, C = SequenceId(1), SequenceId(2), SequenceId(3)


def scheduler(**changes: int) -> DecodeScheduler:
    return DecodeScheduler(**{"total_pages": 10, "page_tokens": 64, "max_batch": 8, "max_waiting": 2} | changes)


def add(plan: DecodeScheduler, sequence: SequenceId, tokens: int = 10, rank: int = 1, arrived_s: float = 0) -> None:
    plan.add(sequence, tokens, rank, arrived_s)


def test_first_come_first_served_within_a_class():
    plan = scheduler()
    add(plan, B, 300, arrived_s=2)
    add(plan, A, 100, arrived_s=1)
    add(plan, C, 10, arrived_s=3)
    assert plan.queue() == [A, B, C]
    plan.admitted(A)
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
        plan.admitted(sequence)
    assert plan.batch() == []
    plan.run(B)
    assert plan.batch() == [B]
    plan.run(A)
    assert plan.batch() == [A, B]
    plan.remove(B)
    assert plan.batch() == [A]


def test_the_batch_has_a_limit():
    plan = scheduler(max_batch=1)
    add(plan, A)
    add(plan, B)
    assert plan.may_admit()
    plan.admitted(A)
    assert not plan.may_admit()
    plan.remove(A)
    assert plan.may_admit()


def test_refuses_what_can_never_fit_and_what_nobody_has_room_to_wait_for():
    plan = scheduler()
    with pytest.raises(InvalidRequest, match="come to 641; this worker holds at most 640"):
        plan.check_fits(641, waiting=0)
    plan.check_fits(640, waiting=1)
    with pytest.raises(Exhausted, match="2 requests wait here already"):
        plan.check_fits(1, waiting=2)


def test_only_legal_transitions():
    plan = scheduler()
    add(plan, A)
    with pytest.raises(AssertionError, match=r"WAITING to State\.RUNNING"):
        plan.run(A)
    assert plan.count(State.WAITING) == 1
