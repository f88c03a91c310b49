"""Which requests are tried alone, and which are blamed."""

import pytest

from isthmus.cluster.requests.suspicion import Suspicion
from isthmus.proto.errors import Blamed, EngineFailed, Exhausted, Lost, Unavailable


def test_a_second_death_alone_is_blamed() -> None:
    suspicion = Suspicion()
    suspicion.failed("r", Unavailable("drained"), 3)
    assert not suspicion.alone
    suspicion.failed("r", EngineFailed("dead", 4), 10)
    assert suspicion.alone
    suspicion.failed("r", Exhausted("full"), 10)
    suspicion.failed("r", Unavailable("somebody else's step failed"), 10)
    with pytest.raises(Blamed, match="request r is not tried again"):
        suspicion.failed("r", EngineFailed("dead", 1), 10)


def test_a_request_that_went_on_alone_is_innocent() -> None:
    suspicion = Suspicion()
    suspicion.failed("r", EngineFailed("dead", 4), 10)
    suspicion.failed("r", EngineFailed("dead", 1), 20)
    assert suspicion.alone
    with pytest.raises(Blamed):
        suspicion.failed("r", EngineFailed("dead", 1), 21)


def test_who_only_shared_a_second_step_is_not_blamed() -> None:
    suspicion = Suspicion()
    for participants in (4, 2, 3):
        suspicion.failed("r", EngineFailed("dead", participants), 10)
    assert suspicion.alone


def test_unexplained_losses_in_a_row_are_blamed_at_last() -> None:
    suspicion = Suspicion()
    alone = []
    for _ in range(4):
        suspicion.failed("r", Lost("gone"), 5)
        alone.append(suspicion.alone)
    assert alone == [False, False, True, True]
    with pytest.raises(Blamed, match="5 workers in a row were lost over it"):
        suspicion.failed("r", Lost("gone"), 5)


def test_workers_killed_while_the_answer_goes_on_blame_nobody() -> None:
    suspicion = Suspicion()
    for tokens in (0, 0, 5, 5, 9, 12, 12, 30, 31, 40):
        suspicion.failed("r", Lost("killed"), tokens)
    assert not suspicion.alone
