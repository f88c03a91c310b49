"""Which workers are believed to hold a prompt's beginning."""

import random

import pytest

from isthmus.cluster.router import prefixes
from isthmus.cluster.router.prefixes import PrefixIndex, prefix_keys_of
from isthmus.kvtransfer.hashing import page_hashes


def keys(*tokens: int, pages: int = 1) -> prefixes.PrefixKeys:
    return prefix_keys_of(page_hashes([token for token in tokens for _ in range(8 * pages)], 8, b"salt"), 8)


def test_keys_are_dense_near_the_beginning() -> None:
    assert [tokens // 8 for tokens, _ in keys(1, pages=40)] == [*range(1, 9), 16, 24, 32, 40]
    assert keys() == ()


def test_the_longest_prefix_of_each_worker() -> None:
    known = PrefixIndex()
    known.remember(0, keys(1, 2, 3))
    known.remember(2, keys(1, 2, 9))
    known.remember(70, keys(1))
    assert known.match(keys(1, 2, 3, 4)) == {0: 24, 2: 16, 70: 8}
    assert known.match(keys(5)) == {}
    assert known.match(()) == {}
    known.forget(0)
    assert known.match(keys(1, 2, 3, 4)) == {2: 16, 70: 8}


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "KEYS_PER_WORKER", 4)
    known = PrefixIndex()
    known.remember(0, keys(1, 2, 3))
    known.remember(0, keys(7, 8))
    assert known.match(keys(1, 2, 3)) == {0: 16}  # the end of a prompt is forgotten before its beginning
    for first in range(20):
        known.remember(0, keys(first))
    assert known.match(keys(1, 2, 3)) == {}
    assert len(known._rows) == 4


def test_random_prompts_match_as_one_step_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bisection finds what a walk along the prompt finds, whatever was given, forgotten or pushed out."""
    monkeypatch.setattr(prefixes, "KEYS_PER_WORKER", 60)
    draw, known = random.Random(0), PrefixIndex()
    for _ in range(600):
        prompt = keys(*(draw.randrange(3) for _ in range(draw.randrange(12))), pages=draw.choice((1, 3)))
        expected: dict[int, int] = {}
        for tokens, address in prompt:
            holders = [row for row, given in known._given.items() if address in given]
            assert set(holders) <= set(expected) or tokens == prompt[0][0]
            expected |= dict.fromkeys(holders, tokens)
        assert known.match(prompt) == expected
        if draw.random() < 0.03:
            known.forget(draw.randrange(40))
        else:
            known.remember(draw.randrange(40), prompt)


def test_many_workers_share_what_is_remembered_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MAX_KEYS", 40)
    known = PrefixIndex()
    for row in range(10):
        for first in range(20):
            known.remember(row, keys(100 * row + first))
        assert known.key_count == sum(map(len, known._given.values())) <= 40
    assert [len(given) for given in known._given.values()] == [4] * 10
    known.forget(3)
    assert known.key_count == len(known._rows) == 36
