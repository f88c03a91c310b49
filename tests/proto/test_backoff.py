"""Waits that double, up to a last one."""

from isthmus.proto.backoff import backoff_s


def test_each_failure_doubles_the_wait_up_to_the_last() -> None:
    assert [backoff_s(failures, 0.5, 4.0) for failures in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_whoever_is_away_for_days_is_still_asked_again() -> None:
    assert backoff_s(100_000, 0.1, 1.0) == 1.0
