"""Who may fill host memory with encoded pages, and when."""

import random

import pytest

from isthmus.prefill.send_budget import Reservation, SendBudget
from isthmus.proto.errors import Exhausted


def reserve(budget: SendBudget, nbytes: int, rank: int = 1) -> Reservation:
    budget.check(nbytes)
    return budget.reserve(nbytes, rank=rank, tokens=nbytes)


def granted(*reservations: Reservation) -> list[bool]:
    return [reservation.granted.is_set() for reservation in reservations]


def test_prompts_wait_in_order_for_their_bytes() -> None:
    budget = SendBudget(100)
    first, large, small = reserve(budget, 60), reserve(budget, 50), reserve(budget, 10)
    assert granted(first, large, small) == [True, False, False], "what fits does not overtake what waits"
    assert (budget.reserved_bytes, budget.waiting, budget.waiting_tokens) == (60, 2, 60)
    budget.end(first)
    assert granted(large, small) == [True, True]
    budget.end(small)
    budget.end(large)
    assert (budget.reserved_bytes, budget.waiting) == (0, 0)


def test_a_higher_class_goes_first() -> None:
    budget = SendBudget(100)
    running = reserve(budget, 100)
    batch, resumed = reserve(budget, 80, rank=3), reserve(budget, 80, rank=-1)
    budget.end(running)
    assert granted(batch, resumed) == [False, True]


def test_one_that_goes_away_lets_those_behind_it_in() -> None:
    budget = SendBudget(100)
    running, large, small = reserve(budget, 60), reserve(budget, 90), reserve(budget, 40)
    budget.end(large)
    assert granted(running, small) == [True, True]


def test_what_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(Exhausted, match="raise host_buffer_gib"):
        SendBudget(100).check(101)


def test_random_prompts_all_have_their_turn_and_the_budget_holds() -> None:
    rng, budget = random.Random(1), SendBudget(1000)
    open_ones: list[Reservation] = []
    for _ in range(3000):
        if open_ones and rng.random() < 0.5:
            budget.end(open_ones.pop(rng.randrange(len(open_ones))))
        else:
            open_ones.append(reserve(budget, rng.randint(1, 1000), rng.randrange(4)))
        assert budget.reserved_bytes == sum(one.nbytes for one in open_ones if one.granted.is_set()) <= 1000
    while open_ones:
        first = next(reservation for reservation in open_ones if reservation.granted.is_set())
        open_ones.remove(first)
        budget.end(first)
    assert budget.reserved_bytes == 0
