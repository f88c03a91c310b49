"""Waits that double, up to a last one."""

from isthmus.proto.backoff import Lives, backoff_s


def test_each_failure_doubles_the_wait_up_to_the_last() -> None:
    assert [backoff_s(failures, 0.5, 4.0) for failures in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_whoever_is_away_for_days_is_still_asked_again() -> None:
    assert backoff_s(100_000, 0.1, 1.0) == 1.0


def test_a_life_of_some_length_is_forgiven() -> None:
    lives = Lives(first_s=0.5, last_s=8.0, healthy_s=60.0)
    pauses = []
    for ends in range(7):
        lives.began(100.0 * ends)
        lives.ended(100.0 * ends + 59)
        pauses.append(lives.next_s - 100.0 * ends - 59)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert lives.reason(lives.next_s - 8) == "ended 7 times; next start in 8 s"
    assert lives.reason(lives.next_s) == "ended 7 times; is being started"
    lives.ended(700.0)  # a start that failed
    assert lives.ends == 8
    lives.began(1000.0)
    lives.ended(1060.0)
    assert (lives.ends, lives.next_s) == (1, 1060.5)
