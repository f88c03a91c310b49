"""Which workers are believed to hold a prompt's beginning."""

import pytest

from isthmus.cluster import prefixes
from isthmus.cluster.prefixes import Prefixes, steps_of
from isthmus.kvtransfer.hashing import page_hashes


def steps(*tokens: int, pages: int = 1) -> prefixes.Steps:
    return steps_of(page_hashes([token for token in tokens for _ in range(8 * pages)], 8, b"salt"), 8)


def test_steps_are_dense_near_the_beginning() -> None:
    assert [tokens // 8 for tokens, _ in steps(1, pages=40)] == [*range(1, 9), 16, 24, 32, 40]
    assert steps() == ()


def test_the_longest_prefix_of_each_worker() -> None:
    known = Prefixes()
    known.remember(0, steps(1, 2, 3))
    known.remember(2, steps(1, 2, 9))
    known.remember(70, steps(1))
    matched = known.match(steps(1, 2, 3, 4), 71)
    assert matched is not None
    assert {row: int(count) for row, count in enumerate(matched) if count} == {0: 24, 2: 16, 70: 8}
    assert known.match(steps(5), 71) is None
    known.forget(0)
    matched = known.match(steps(1, 2, 3, 4), 71)
    assert matched is not None
    assert matched[0] == 0
    assert matched[2] == 16


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "STEPS_PER_WORKER", 4)
    known = Prefixes()
    known.remember(0, steps(1, 2, 3))
    known.remember(0, steps(7, 8))
    matched = known.match(steps(1, 2, 3), 1)
    assert matched is not None
    assert matched.tolist() == [16]  # the end of a prompt is forgotten before its beginning
    for first in range(20):
        known.remember(0, steps(first))
    assert known.match(steps(1, 2, 3), 1) is None
    assert len(known._rows) == 4
