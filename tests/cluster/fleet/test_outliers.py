"""Who is ejected, and how it comes back."""

from isthmus.cluster.fleet.outliers import FAILURES, FIRST_S, LAST_S, SLOW_SAMPLES, Outliers


def four() -> Outliers:
    outliers = Outliers()
    for name in "abcd":
        outliers.add(name)
    return outliers


def fail(outliers: Outliers, worker: str, now_s: float, times: int = FAILURES) -> None:
    for _ in range(times):
        outliers.failed(worker, now_s)


def test_failures_in_a_row_eject_and_one_probe_decides() -> None:
    outliers = four()
    fail(outliers, "a", 0.0, FAILURES - 1)
    outliers.served("a", 0.0)
    fail(outliers, "a", 0.0, FAILURES - 1)
    assert not outliers.ejected("a", 0.0)
    outliers.failed("a", 0.0)
    assert outliers.ejected("a", FIRST_S - 0.1)
    assert not outliers.ejected("a", FIRST_S)  # it may have one request
    outliers.placed("a", FIRST_S)
    assert outliers.ejected("a", FIRST_S)  # and no second one
    outliers.failed("a", 6.0)
    assert outliers.ejected("a", 6.0 + 2 * FIRST_S - 0.1)  # longer than before
    outliers.placed("a", 20.0)
    outliers.served("a", 20.0)
    assert not outliers.ejected("a", 20.0)


def test_never_more_than_half() -> None:
    outliers = four()
    for worker in "abcd":
        fail(outliers, worker, 0.0)
    assert [outliers.ejected(worker, 0.0) for worker in "abcd"] == [True, True, False, False]
    alone = Outliers()
    alone.add("a")
    fail(alone, "a", 0.0)
    assert not alone.ejected("a", 0.0)


def test_far_slower_than_the_others() -> None:
    outliers = four()
    for _ in range(SLOW_SAMPLES):
        for worker in "bcd":
            outliers.served(worker, 0.0, took_ms=120, expected_ms=100)
        outliers.served("a", 0.0, took_ms=900, expected_ms=100)
    assert [outliers.ejected(worker, 0.0) for worker in "abcd"] == [True, False, False, False]


def test_all_slow_is_nobodys_fault() -> None:
    outliers = four()
    for _ in range(2 * SLOW_SAMPLES):
        for worker in "abcd":
            outliers.served(worker, 0.0, took_ms=900, expected_ms=100)
    assert not any(outliers.ejected(worker, 0.0) for worker in "abcd")


def test_one_that_is_started_anew_begins_anew() -> None:
    outliers = four()
    fail(outliers, "a", 0.0)
    outliers.add("a")
    assert not outliers.ejected("a", 0.0)


def test_a_worker_that_fails_for_days_is_still_asked_again() -> None:
    outliers, now_s = four(), 0.0
    fail(outliers, "a", now_s)
    for _ in range(2_000):
        now_s += LAST_S
        outliers.placed("a", now_s)
        outliers.failed("a", now_s)
    assert outliers.ejected("a", now_s + LAST_S - 0.1)
    assert not outliers.ejected("a", now_s + LAST_S)


def test_a_worker_that_is_gone_is_not_counted_among_the_others() -> None:
    outliers = four()
    for worker in "cd":
        fail(outliers, worker, 0.0)
        outliers.remove(worker)
    fail(outliers, "a", 0.0)
    assert outliers.ejected("a", 0.0)
