"""From when on a step is taken for stuck."""

from isthmus.worker.stamps import LOOK_S, MEASURED, STUCK_S, TIMES, Stamps


def measured(token_s: float) -> Stamps:
    """Stamps of an engine whose steps of 84 tokens take `token_s` for each of 100."""
    stamps = Stamps()
    for number in range(MEASURED):
        stamps.begin(1000.0 * number, 84)
        stamps.end(1000.0 * number + 100 * token_s, None)
    return stamps


def looks_until_stuck(stamps: Stamps, tokens: int) -> float:
    stamps.begin(0.0, tokens)
    looks = 0
    while stamps.look() is None:
        looks += 1
    return looks * LOOK_S


def test_the_bound_grows_with_the_step() -> None:
    assert STUCK_S < looks_until_stuck(measured(0.001), 1) < STUCK_S + 1
    assert STUCK_S + 2 * TIMES < looks_until_stuck(measured(0.01), 256) < STUCK_S + 3 * TIMES


def test_first_steps_may_take_minutes() -> None:
    assert looks_until_stuck(Stamps(), 100) > 300


def test_steps_that_go_on_are_never_stuck() -> None:
    stamps = measured(0.001)
    for number in range(1000):
        stamps.begin(number, 1)
        assert stamps.look() is None
        stamps.end(number, None)
        stamps.clear()


def test_what_was_interrupted_has_its_whole_time_again() -> None:
    stamps = measured(0.001)
    stamps.begin(0.0, 1)
    for _ in range(int(STUCK_S / LOOK_S)):
        assert stamps.look() is None
    outer = stamps.begin(6.0, 1)
    stamps.end(6.1, outer)
    for _ in range(int(STUCK_S / LOOK_S)):
        assert stamps.look() is None


def test_the_bound_is_that_of_the_longest_part() -> None:
    """Steps of ten parts of one second, but for one of three: a part is taken for stuck after five times three."""
    stamps = Stamps()
    for _ in range(MEASURED):
        now_s = 0.0
        stamps.begin(now_s, 84)
        for part_s in (1, 1, 1, 3, 1, 1, 1, 1, 1, 1):
            now_s += part_s
            stamps.reach(now_s)
        stamps.end(now_s, None)
    assert STUCK_S + 3 * TIMES <= looks_until_stuck(stamps, 84) < STUCK_S + 3 * TIMES + 1


def test_a_step_whose_parts_go_on_is_never_stuck() -> None:
    stamps = measured(0.001)
    stamps.begin(0.0, 1)
    for layer in range(1000):
        for _ in range(int(STUCK_S / LOOK_S)):
            assert stamps.look() is None
        stamps.reach(STUCK_S * layer)
