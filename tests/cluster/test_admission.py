"""Who starts, who waits, who is refused."""

import pytest

from isthmus.cluster.admission import Admission, Ticket, Wanted
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from isthmus.proto.errors import Exhausted, Expired


def wanted(tenant: str = "", tokens: int = 100, priority: int = PRIORITY_STANDARD) -> Wanted:
    return Wanted(priority=priority, tenant=tenant, tokens=tokens)


def order(admission: Admission, first: Ticket) -> list[str]:
    """Tenants in the order they start when one runs at a time."""
    tenants, running, now_s = [], first, 0.0
    while True:
        now_s += 1
        admission.leave(running, now_s)
        started = admission.start(100)
        if not started:
            return tenants
        (running,) = started
        tenants.append(running.wanted.tenant)


def test_what_fits_starts_at_once_and_one_always_runs() -> None:
    admission = Admission(max_waiting=10, weights={})
    big = admission.ask(wanted(tokens=900), 500, None)
    assert admission.start(500) == [big]
    small = admission.ask(wanted(tokens=1), 500, None)
    assert admission.start(500) == []
    admission.leave(big, 1.0)
    assert admission.start(500) == [small]
    admission.leave(small, 2.0)
    assert (admission.running_tokens, admission.waiting) == (0, 0)


def test_classes_start_in_their_order() -> None:
    admission = Admission(max_waiting=10, weights={})
    first = admission.ask(wanted(), 100, None)
    admission.start(100)
    for priority in (PRIORITY_BATCH, PRIORITY_STANDARD, PRIORITY_INTERACTIVE):
        admission.ask(wanted(str(priority), priority=priority), 100, None)
    expected = [PRIORITY_INTERACTIVE, PRIORITY_STANDARD, PRIORITY_BATCH]
    assert order(admission, first) == [str(priority) for priority in expected]


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    admission = Admission(max_waiting=100, weights={})
    first = admission.ask(wanted("flood"), 100, None)
    admission.start(100)
    for _ in range(20):
        admission.ask(wanted("flood"), 100, None)
    for _ in range(3):
        admission.ask(wanted("other"), 100, None)
    assert order(admission, first)[:7].count("other") == 3


def test_weights_share_the_tokens() -> None:
    admission = Admission(max_waiting=100, weights={"heavy": 3.0})
    first = admission.ask(wanted("nobody"), 100, None)
    admission.start(100)
    for _ in range(30):
        for tenant in ("heavy", "light"):
            admission.ask(wanted(tenant), 100, None)
    assert order(admission, first)[:20].count("heavy") == pytest.approx(15, abs=1)


def test_a_full_queue_refuses_its_class_alone() -> None:
    admission = Admission(max_waiting=2, weights={})
    admission.ask(wanted(), 100, None)
    admission.start(100)
    for _ in range(2):
        admission.ask(wanted(priority=PRIORITY_BATCH), 100, None)
    with pytest.raises(Exhausted, match="2 requests"):
        admission.ask(wanted(priority=PRIORITY_BATCH), 100, None)
    admission.ask(wanted(priority=PRIORITY_INTERACTIVE), 100, None)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    admission = Admission(max_waiting=10, weights={})
    tickets = [admission.ask(wanted(), 100, None)]
    admission.start(100)
    for second in (1, 2, 3):  # 100 tokens end each second
        tickets.append(admission.ask(wanted(), 100, None))
        admission.leave(tickets[-2], float(second))
        admission.start(100)
    admission.ask(wanted(), 100, None)
    with pytest.raises(Expired, match=r"about 2.0 s"):
        admission.ask(wanted(), 100, 1.5)
    assert admission.waiting == 1
    admission.ask(wanted(), 100, 2.5)


def test_one_that_waits_no_more_holds_nothing() -> None:
    admission = Admission(max_waiting=10, weights={})
    running = admission.ask(wanted(), 100, None)
    admission.start(100)
    gone = admission.ask(wanted("gone"), 100, None)
    last = admission.ask(wanted("last"), 100, None)
    admission.leave(gone, 1.0)
    admission.leave(gone, 1.0)
    admission.leave(running, 2.0)
    assert admission.start(100) == [last]
