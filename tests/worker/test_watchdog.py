"""From when on a step is taken for stuck."""

from isthmus.worker.watchdog import CHECK_S, MEASURED_STEPS, STUCK_FACTOR, STUCK_S, Watchdog


def measured(token_s: float) -> Watchdog:
    """That of an engine whose steps of 84 tokens take `token_s` for each of 100."""
    watchdog = Watchdog()
    for number in range(MEASURED_STEPS):
        watchdog.begin(1000.0 * number, 84)
        watchdog.end(1000.0 * number + 100 * token_s, None)
    return watchdog


def seconds_until_stuck(watchdog: Watchdog, tokens: int) -> float:
    watchdog.begin(0.0, tokens)
    checks = 0
    while watchdog.check() is None:
        checks += 1
    return checks * CHECK_S


def test_the_bound_grows_with_the_step() -> None:
    assert STUCK_S < seconds_until_stuck(measured(0.001), 1) < STUCK_S + 1
    assert STUCK_S + 2 * STUCK_FACTOR < seconds_until_stuck(measured(0.01), 256) < STUCK_S + 3 * STUCK_FACTOR


def test_first_steps_may_take_minutes() -> None:
    assert seconds_until_stuck(Watchdog(), 100) > 300


def test_steps_that_go_on_are_never_stuck() -> None:
    watchdog = measured(0.001)
    for number in range(1000):
        watchdog.begin(number, 1)
        assert watchdog.check() is None
        watchdog.end(number, None)
        watchdog.clear()


def test_what_was_interrupted_has_its_whole_time_again() -> None:
    watchdog = measured(0.001)
    watchdog.begin(0.0, 1)
    for _ in range(int(STUCK_S / CHECK_S)):
        assert watchdog.check() is None
    outer = watchdog.begin(6.0, 1)
    watchdog.end(6.1, outer)
    for _ in range(int(STUCK_S / CHECK_S)):
        assert watchdog.check() is None


def test_the_bound_is_that_of_the_longest_part() -> None:
    """Steps of ten parts of one second, but for one of three: a part is taken for stuck after five times three."""
    watchdog = Watchdog()
    for _ in range(MEASURED_STEPS):
        now_s = 0.0
        watchdog.begin(now_s, 84)
        for part_s in (1, 1, 1, 3, 1, 1, 1, 1, 1, 1):
            now_s += part_s
            watchdog.begin_part(now_s)
        watchdog.end(now_s, None)
    assert STUCK_S + 3 * STUCK_FACTOR <= seconds_until_stuck(watchdog, 84) < STUCK_S + 3 * STUCK_FACTOR + 1


def test_a_step_whose_parts_go_on_is_never_stuck() -> None:
    watchdog = measured(0.001)
    watchdog.begin(0.0, 1)
    for layer in range(1000):
        for _ in range(int(STUCK_S / CHECK_S)):
            assert watchdog.check() is None
        watchdog.begin_part(STUCK_S * layer)
