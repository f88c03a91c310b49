"""Who starts, who waits, who is refused."""

import pytest
from routing_tables import board, demand

from isthmus.cluster.requests.fair_queue import Admission, Ticket, Wanted
from isthmus.cluster.router.estimates import Expected, expected
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


@pytest.mark.parametrize(
    ("expects", "message", "retry_s"),
    [
        (Expected(ttft_s=1.4, idle_ttft_s=1.4), None, None),
        (Expected(ttft_s=2.5, idle_ttft_s=0.5), "first token then takes about 2.5 s", 1.0),
        (Expected(ttft_s=2.5, idle_ttft_s=1.6), "about 1.6 s with nothing ahead", None),
        (Expected(ttft_s=0.1, idle_ttft_s=0.1, finish_s=2.9), None, None),
        (Expected(ttft_s=0.1, idle_ttft_s=0.1, finish_s=3.1), "about 3.1 s at least", None),
    ],
)
def test_a_first_token_that_comes_late_is_refused_at_once(
    expects: Expected, message: str | None, retry_s: float | None
) -> None:
    admission = Admission(max_waiting=10, weights={})
    if message is None:
        admission.ask(wanted(), 100, 1.5, expects)
        assert admission.waiting == 1
        return
    with pytest.raises(Expired, match=message) as raised:
        admission.ask(wanted(), 100, 1.5, expects)
    assert raised.value.retry_after_s == (None if retry_s is None else pytest.approx(retry_s))
    assert admission.waiting == 0
    admission.ask(wanted(), 100, None, expects)


def test_what_is_expected_goes_by_what_was_measured() -> None:
    busy = board(1, 1, p0={"queued_tokens": 2000}, d0={"requests": 10})
    found = expected(demand(prompt_tokens=1000), busy, insists=0, local_prefill="never")
    assert found is not None
    assert found.ttft_s == pytest.approx((2 * 5 + 3000 * 0.5 + 1000 * 3 * 0.5 * 0.01 - 0) / 1e3, rel=0.01)
    assert found.idle_ttft_s == found.finish_s == pytest.approx((2 * 5 + 1000 * 0.505) / 1e3)
    insisting = expected(demand(prompt_tokens=1000), busy, insists=101, local_prefill="never")
    assert insisting is not None
    assert insisting.finish_s == pytest.approx(found.idle_ttft_s + 100 * 5 / 1e3)
    for unknown in (
        board(1, 1, p0={"prefill": None}, d0={"prefill": None}),
        board(1, 1, d0={"step": None}),
        board(1, 1, p0={"suspect": True}),
        board(0, 1),
    ):
        assert expected(demand(), unknown, insists=0, local_prefill="never") is None


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


def test_a_tenant_pays_for_what_began_only() -> None:
    admission = Admission(max_waiting=100, weights={})
    first = admission.ask(wanted("first"), 100, None)
    admission.start(100)
    for number in range(20):
        admission.leave(admission.ask(wanted("fickle"), 100, None), float(number))
    for _ in range(2):
        admission.ask(wanted("other"), 100, None)
        admission.ask(wanted("fickle"), 100, None)
    assert order(admission, first) == ["other", "fickle", "other", "fickle"]


def test_shares_are_kept_for_so_many_tenants_and_the_heaviest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cluster.requests.fair_queue.MAX_TENANTS", 10)
    admission = Admission(max_waiting=1000, weights={})
    admission.ask(wanted("heavy", tokens=1000), 1000, None)
    admission.start(1000)
    for number in range(500):
        admission.ask(wanted(f"made up {number}", tokens=1), 10**6, None)
        admission.start(10**6)
        assert len(admission._last) <= 10
    assert "heavy" in admission._last


def test_nobody_owes_anything_once_all_have_ended() -> None:
    admission = Admission(max_waiting=10, weights={})
    running = [admission.ask(wanted(tenant), 1000, None) for tenant in "abc"]
    assert admission.start(1000) == running
    for ticket in running:
        admission.leave(ticket, 1.0)
    assert admission._last == {}
