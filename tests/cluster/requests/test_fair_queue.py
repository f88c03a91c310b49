"""Who starts, who waits, who is refused."""

import pytest
from routing_tables import demand, routing_table

from isthmus.cluster.requests.fair_queue import Claim, FairQueue, Ticket
from isthmus.cluster.router.estimates import LatencyEstimate, estimate_latency
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from isthmus.proto.errors import Exhausted, Expired


def claim(tenant: str = "", tokens: int = 100, priority: int = PRIORITY_STANDARD) -> Claim:
    return Claim(priority=priority, tenant=tenant, tokens=tokens)


def order(queue: FairQueue, first: Ticket) -> list[str]:
    """Tenants in the order they start when one runs at a time."""
    tenants, running, now_s = [], first, 0.0
    while True:
        now_s += 1
        queue.remove(running, now_s)
        started = queue.start(100)
        if not started:
            return tenants
        (running,) = started
        tenants.append(running.claim.tenant)


def test_what_fits_starts_at_once_and_one_always_runs() -> None:
    queue = FairQueue(max_waiting=10, weights={})
    big = queue.enqueue(claim(tokens=900), 500, None)
    assert queue.start(500) == [big]
    small = queue.enqueue(claim(tokens=1), 500, None)
    assert queue.start(500) == []
    queue.remove(big, 1.0)
    assert queue.start(500) == [small]
    queue.remove(small, 2.0)
    assert (queue.running_tokens, queue.waiting) == (0, 0)


def test_classes_start_in_their_order() -> None:
    queue = FairQueue(max_waiting=10, weights={})
    first = queue.enqueue(claim(), 100, None)
    queue.start(100)
    for priority in (PRIORITY_BATCH, PRIORITY_STANDARD, PRIORITY_INTERACTIVE):
        queue.enqueue(claim(str(priority), priority=priority), 100, None)
    expected = [PRIORITY_INTERACTIVE, PRIORITY_STANDARD, PRIORITY_BATCH]
    assert order(queue, first) == [str(priority) for priority in expected]


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    queue = FairQueue(max_waiting=100, weights={})
    first = queue.enqueue(claim("flood"), 100, None)
    queue.start(100)
    for _ in range(20):
        queue.enqueue(claim("flood"), 100, None)
    for _ in range(3):
        queue.enqueue(claim("other"), 100, None)
    assert order(queue, first)[:7].count("other") == 3


def test_weights_share_the_tokens() -> None:
    queue = FairQueue(max_waiting=100, weights={"heavy": 3.0})
    first = queue.enqueue(claim("nobody"), 100, None)
    queue.start(100)
    for _ in range(30):
        for tenant in ("heavy", "light"):
            queue.enqueue(claim(tenant), 100, None)
    assert order(queue, first)[:20].count("heavy") == pytest.approx(15, abs=1)


def test_a_full_queue_refuses_its_class_alone() -> None:
    queue = FairQueue(max_waiting=2, weights={})
    queue.enqueue(claim(), 100, None)
    queue.start(100)
    for _ in range(2):
        queue.enqueue(claim(priority=PRIORITY_BATCH), 100, None)
    with pytest.raises(Exhausted, match="2 requests"):
        queue.enqueue(claim(priority=PRIORITY_BATCH), 100, None)
    queue.enqueue(claim(priority=PRIORITY_INTERACTIVE), 100, None)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    queue = FairQueue(max_waiting=10, weights={})
    tickets = [queue.enqueue(claim(), 100, None)]
    queue.start(100)
    for second in (1, 2, 3):  # 100 tokens end each second
        tickets.append(queue.enqueue(claim(), 100, None))
        queue.remove(tickets[-2], float(second))
        queue.start(100)
    queue.enqueue(claim(), 100, None)
    with pytest.raises(Expired, match=r"about 2.0 s"):
        queue.enqueue(claim(), 100, 1.5)
    assert queue.waiting == 1
    queue.enqueue(claim(), 100, 2.5)


def test_a_short_deadline_is_told_in_milliseconds() -> None:
    queue = FairQueue(max_waiting=10, weights={})
    with pytest.raises(Expired, match=r"about 2\.0 s with nothing ahead, and the deadline is in 10 ms: not begun"):
        queue.enqueue(claim(), 100, 0.01, LatencyEstimate(ttft_s=2.0, idle_ttft_s=2.0))


@pytest.mark.parametrize(
    ("estimate", "message", "retry_s"),
    [
        (LatencyEstimate(ttft_s=1.4, idle_ttft_s=1.4), None, None),
        (LatencyEstimate(ttft_s=2.5, idle_ttft_s=0.5), "first token then takes about 2.5 s", 1.0),
        (LatencyEstimate(ttft_s=2.5, idle_ttft_s=1.6), "about 1.6 s with nothing ahead", None),
        (LatencyEstimate(ttft_s=0.1, idle_ttft_s=0.1, finish_s=2.9), None, None),
        (LatencyEstimate(ttft_s=0.1, idle_ttft_s=0.1, finish_s=3.1), "about 3.1 s at least", None),
    ],
)
def test_a_first_token_that_comes_late_is_refused_at_once(
    estimate: LatencyEstimate, message: str | None, retry_s: float | None
) -> None:
    queue = FairQueue(max_waiting=10, weights={})
    if message is None:
        queue.enqueue(claim(), 100, 1.5, estimate)
        assert queue.waiting == 1
        return
    with pytest.raises(Expired, match=message) as raised:
        queue.enqueue(claim(), 100, 1.5, estimate)
    assert raised.value.retry_after_s == (None if retry_s is None else pytest.approx(retry_s))
    assert queue.waiting == 0
    queue.enqueue(claim(), 100, None, estimate)


def test_what_is_expected_goes_by_what_was_measured() -> None:
    busy = routing_table(1, 1, p0={"queued_tokens": 2000}, d0={"requests": 10})
    found = estimate_latency(demand(prompt_tokens=1000), busy, min_output_tokens=0, local_prefill="never")
    assert found is not None
    assert found.ttft_s == pytest.approx((2 * 5 + 3000 * 0.5 + 1000 * 3 * 0.5 * 0.01 - 0) / 1e3, rel=0.01)
    assert found.idle_ttft_s == found.finish_s == pytest.approx((2 * 5 + 1000 * 0.505) / 1e3)
    insisting = estimate_latency(demand(prompt_tokens=1000), busy, min_output_tokens=101, local_prefill="never")
    assert insisting is not None
    assert insisting.finish_s == pytest.approx(found.idle_ttft_s + 100 * 5 / 1e3)
    for unknown in (
        routing_table(1, 1, p0={"prefill": None}, d0={"prefill": None}),
        routing_table(1, 1, d0={"step": None}),
        routing_table(1, 1, p0={"suspect": True}),
        routing_table(0, 1),
    ):
        assert estimate_latency(demand(), unknown, min_output_tokens=0, local_prefill="never") is None


def test_one_that_waits_no_more_holds_nothing() -> None:
    queue = FairQueue(max_waiting=10, weights={})
    running = queue.enqueue(claim(), 100, None)
    queue.start(100)
    gone = queue.enqueue(claim("gone"), 100, None)
    last = queue.enqueue(claim("last"), 100, None)
    queue.remove(gone, 1.0)
    queue.remove(gone, 1.0)
    queue.remove(running, 2.0)
    assert queue.start(100) == [last]


def test_a_tenant_pays_for_what_began_only() -> None:
    queue = FairQueue(max_waiting=100, weights={})
    first = queue.enqueue(claim("first"), 100, None)
    queue.start(100)
    for number in range(20):
        queue.remove(queue.enqueue(claim("fickle"), 100, None), float(number))
    for _ in range(2):
        queue.enqueue(claim("other"), 100, None)
        queue.enqueue(claim("fickle"), 100, None)
    assert order(queue, first) == ["other", "fickle", "other", "fickle"]


def test_shares_are_kept_for_so_many_tenants_and_the_heaviest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cluster.requests.fair_queue.MAX_TENANTS", 10)
    queue = FairQueue(max_waiting=1000, weights={})
    queue.enqueue(claim("heavy", tokens=1000), 1000, None)
    queue.start(1000)
    for number in range(500):
        queue.enqueue(claim(f"made up {number}", tokens=1), 10**6, None)
        queue.start(10**6)
        assert len(queue._finish) <= 10
    assert "heavy" in queue._finish


def test_nobody_owes_anything_once_all_have_ended() -> None:
    queue = FairQueue(max_waiting=10, weights={})
    running = [queue.enqueue(claim(tenant), 1000, None) for tenant in "abc"]
    assert queue.start(1000) == running
    for ticket in running:
        queue.remove(ticket, 1.0)
    assert queue._finish == {}
