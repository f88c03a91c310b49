"""Limits of callers, by a clock that the tests set; failures of addresses."""

import random

import pytest

from isthmus.cluster.access.peers import FREE, LONGEST_S, MAX_HELD, MAX_PEERS, PeerFailures, address_of
from isthmus.cluster.access.settings import NO_LIMITS, Limits
from isthmus.cluster.access.usage import Account, Accounts, Bucket, OverLimit, Permit, reserve_for_job
from isthmus.proto.errors import InvalidRequest


def test_a_minute_s_requests_and_not_one_more() -> None:
    accounts, limits = Accounts(), Limits(requests_per_min=60)
    for _ in range(60):
        accounts.enter("a", limits, 0.0).close(0.0, refused=False)
    with pytest.raises(OverLimit) as raised:
        accounts.enter("a", limits, 0.0)
    assert (raised.value.reason, raised.value.retry_after_s) == ("requests_per_min", pytest.approx(1.0))
    with pytest.raises(OverLimit):
        accounts.enter("a", limits, 0.999)
    accounts.enter("a", limits, 1.0)
    with pytest.raises(OverLimit):
        accounts.enter("a", limits, 1.0)
    accounts.enter("b", limits, 1.0)  # somebody else


def test_the_hint_is_when_it_is_let_in() -> None:
    drawn = random.Random(3)
    for _ in range(300):
        size, now = drawn.randrange(1, 10_000), drawn.uniform(0, 1e6)
        bucket = Bucket(size, now)
        bucket.take(drawn.uniform(0, size), now)
        amount = drawn.uniform(0, size)
        wait_s = bucket.wait_s(amount, now)
        assert 0 <= wait_s <= 60
        if wait_s:
            assert bucket.wait_s(amount, now + wait_s * 0.99) > 0
        assert bucket.wait_s(amount, now + wait_s + 1e-6) == 0


def test_a_clock_that_turns_back_gives_nothing() -> None:
    bucket = Bucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.wait_s(1, 40.0) == pytest.approx(1.0)
    assert bucket.wait_s(1, 100.0) == pytest.approx(1.0)
    assert bucket.wait_s(1, 101.0) == 0


def test_no_more_than_a_minute_s_worth_gathers() -> None:
    bucket = Bucket(10, 0.0)
    assert bucket.wait_s(10, 1e9) == 0
    bucket.take(10, 1e9)
    assert bucket.wait_s(10, 1e9) == pytest.approx(60)


def permit_of(tokens_per_min: int) -> tuple[Accounts, Limits]:
    return Accounts(), Limits(tokens_per_min=tokens_per_min)


def test_tokens_are_taken_at_first_and_what_was_not_used_comes_back() -> None:
    accounts, limits = permit_of(100)
    permit = accounts.enter("a", limits, 0.0)
    permit.reserve(20, 80, 0.0)
    with pytest.raises(OverLimit) as raised:
        accounts.enter("a", limits, 0.0).reserve(1, 1, 0.0)
    assert (raised.value.reason, raised.value.retry_after_s) == ("tokens_per_min", pytest.approx(1.2))
    permit.output_tokens = 10
    permit.close(0.0, refused=False)
    accounts.enter("a", limits, 0.0).reserve(30, 40, 0.0)
    with pytest.raises(OverLimit):
        accounts.enter("a", limits, 0.0).reserve(1, 1, 0.0)


@pytest.mark.parametrize(
    ("refused", "output", "left"),
    [(True, 0, 100), (True, 5, 75), (False, 0, 80), (False, 5, 75), (False, 80, 0)],
)
def test_what_a_request_costs(refused: bool, output: int, left: int) -> None:
    """Refused before any output: nothing. Gone away before any output: its prompt, which may have been computed."""
    accounts, limits = permit_of(100)
    permit = accounts.enter("a", limits, 0.0)
    permit.reserve(20, 80, 0.0)
    permit.output_tokens = output
    permit.close(0.0, refused=refused)
    assert permit.account.tokens is not None
    assert permit.account.tokens.level == pytest.approx(left)


def test_what_never_fits_is_not_waited_for() -> None:
    accounts, limits = permit_of(100)
    with pytest.raises(InvalidRequest, match="come to 101 tokens; allowed for you: 100 a minute"):
        accounts.enter("a", limits, 0.0).reserve(1, 100, 0.0)


def test_so_many_run_at_once() -> None:
    accounts, limits = Accounts(), Limits(running=2)
    first, _ = accounts.enter("a", limits, 0.0), accounts.enter("a", limits, 0.0)
    with pytest.raises(OverLimit) as raised:
        accounts.enter("a", limits, 0.0)
    assert raised.value.reason == "running"
    first.close(0.0, refused=False)
    accounts.enter("a", limits, 0.0)


def test_a_refused_request_takes_no_place_and_no_request() -> None:
    accounts, limits = Accounts(), Limits(running=1, requests_per_min=2)
    running = accounts.enter("a", limits, 0.0)
    for _ in range(5):
        with pytest.raises(OverLimit):
            accounts.enter("a", limits, 0.0)
    running.close(0.0, refused=False)
    accounts.enter("a", limits, 0.0)


def test_limits_that_change_apply_at_once() -> None:
    accounts = Accounts()
    for _ in range(10):
        accounts.enter("a", Limits(requests_per_min=10), 0.0)
    with pytest.raises(OverLimit):
        accounts.enter("a", Limits(requests_per_min=5), 0.0)
    with pytest.raises(OverLimit):
        accounts.enter("a", Limits(requests_per_min=1000), 0.0)  # what was used is used
    accounts.enter("a", Limits(requests_per_min=1000), 0.06)
    accounts.enter("a", NO_LIMITS, 0.06)


def test_accounts_are_bounded_and_none_in_use_is_forgotten() -> None:
    accounts, limits = Accounts(most=10), Limits(running=1)
    busy = accounts.enter("busy", limits, 0.0)
    for number in range(1000):
        accounts.enter(f"idle {number}", limits, 0.0).close(0.0, refused=False)
        assert len(accounts) <= 11
    with pytest.raises(OverLimit):
        accounts.enter("busy", limits, 0.0)
    busy.close(0.0, refused=False)
    accounts.enter("busy", limits, 0.0)
    assert len(accounts) <= 11


def test_without_limits_nothing_is_remembered() -> None:
    accounts = Accounts()
    for number in range(100):
        accounts.enter(f"tenant {number}", NO_LIMITS, 0.0).reserve(10**9, 10**9, 0.0)
    assert len(accounts) == 0


def test_a_job_s_request_waits_for_its_tokens_and_for_no_more_than_there_ever_are() -> None:
    bucket = Bucket(100, 0.0)
    permit = Permit(Account(tokens=bucket, running=1))
    assert reserve_for_job(permit, 60, 30, 0.0) == 0
    second = Permit(Account(tokens=bucket, running=1))
    assert reserve_for_job(second, 100, 900, 0.0) == pytest.approx(54)
    assert reserve_for_job(second, 100, 900, 54.0) == 0
    second.close(54.0, refused=True)
    assert bucket.level == pytest.approx(100)  # no more than was taken


def test_failures_are_slowed_the_more_there_are() -> None:
    failures = PeerFailures()
    waits = [failures.failed("10.0.0.7", 0.0) for _ in range(FREE + 10)]
    assert waits[:FREE] == [0.0] * FREE
    assert waits[FREE : FREE + 3] == [1.0, 2.0, 3.0]
    assert set(waits[FREE + 3 :]) == {LONGEST_S}
    assert failures.is_noisy("10.0.0.7")
    assert failures.failed("10.0.0.8", 0.0) == 0.0  # somebody else
    assert failures.failed("10.0.0.7", 60.0) == 0.0  # some time later
    assert not failures.is_noisy("10.0.0.7")


def test_failures_take_bounded_memory() -> None:
    failures = PeerFailures()
    for number in range(MAX_PEERS + 1000):
        failures.failed(f"peer {number}", 0.0)
    assert len(failures) == MAX_PEERS
    failures.held = MAX_HELD
    assert {failures.failed("peer", 0.0) for _ in range(50)} == {0.0}


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:41234", "10.0.0.7"),
        ("ipv6:%5B::1%5D:41234", "::"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:41234", "2001:db8:1:2::"),
        ("ipv6:%5B2001:db8:1:2:ffff::9%5D:80", "2001:db8:1:2::"),
        ("ipv6:[::ffff:10.0.0.7]:41234", "10.0.0.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:41234", "fe80::"),
        ("unix:", "unix"),
        ("unix:/run/x", "unix"),
        ("ipv4:", "ipv4"),
        ("", ""),
        ("ipv6:[garbage", "ipv6"),
    ],
)
def test_addresses_of_peers(peer: str, address: str) -> None:
    assert address_of(peer) == address
