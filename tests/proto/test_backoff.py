"""Waits that double, up to a last one."""

from isthmus.proto.backoff import Restarts, backoff_s


def test_each_failure_doubles_the_wait_up_to_the_last() -> None:
    assert [backoff_s(failures, 0.5, 4.0) for failures in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_failures_for_days_overflow_nothing() -> None:
    assert backoff_s(100_000, 0.1, 1.0) == 1.0


def test_who_ran_for_long_begins_with_the_first_pause_again() -> None:
    restarts = Restarts(first_s=0.5, last_s=8.0, healthy_s=60.0)
    pauses = []
    for ends in range(7):
        restarts.began(100.0 * ends)
        restarts.ended(100.0 * ends + 59)
        pauses.append(restarts.next_s - 100.0 * ends - 59)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert restarts.reason(restarts.next_s - 8) == "ended 7 times; next start in 8 s"
    assert restarts.reason(restarts.next_s) == "ended 7 times; is being started"
    restarts.ended(700.0)  # a start that failed
    assert restarts.ends == 8
    restarts.began(1000.0)
    restarts.ended(1060.0)
    assert (restarts.ends, restarts.next_s) == (1, 1060.5)
