"""Who may fill host memory with encoded pages, and when."""

import random

import pytest

from isthmus.prefill.send_budget import SendBudget, Share
from isthmus.proto.errors import Exhausted


def ask(budget: SendBudget, nbytes: int, rank: int = 1) -> Share:
    budget.check(nbytes)
    return budget.ask(nbytes, rank=rank, tokens=nbytes)


def held(*shares: Share) -> list[bool]:
    return [share.turn.is_set() for share in shares]


def test_prompts_wait_in_order_for_their_share() -> None:
    budget = SendBudget(100)
    first, large, small = ask(budget, 60), ask(budget, 50), ask(budget, 10)
    assert held(first, large, small) == [True, False, False], "what fits does not overtake what waits"
    assert (budget.held_bytes, budget.waiting, budget.waiting_tokens) == (60, 2, 60)
    budget.leave(first)
    assert held(large, small) == [True, True]
    budget.leave(small)
    budget.leave(large)
    assert (budget.held_bytes, budget.waiting) == (0, 0)


def test_a_higher_class_goes_first() -> None:
    budget = SendBudget(100)
    running = ask(budget, 100)
    batch, resumed = ask(budget, 80, rank=3), ask(budget, 80, rank=-1)
    budget.leave(running)
    assert held(batch, resumed) == [False, True]


def test_one_that_goes_away_lets_those_behind_it_in() -> None:
    budget = SendBudget(100)
    running, large, small = ask(budget, 60), ask(budget, 90), ask(budget, 40)
    budget.leave(large)
    assert held(running, small) == [True, True]


def test_what_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(Exhausted, match="raise host_buffer_gib"):
        SendBudget(100).check(101)


def test_random_prompts_all_have_their_turn_and_the_budget_holds() -> None:
    rng, budget = random.Random(1), SendBudget(1000)
    open_shares: list[Share] = []
    for _ in range(3000):
        if open_shares and rng.random() < 0.5:
            budget.leave(open_shares.pop(rng.randrange(len(open_shares))))
        else:
            open_shares.append(ask(budget, rng.randint(1, 1000), rng.randrange(4)))
        assert budget.held_bytes == sum(share.nbytes for share in open_shares if share.turn.is_set()) <= 1000
    while open_shares:
        first = next(share for share in open_shares if share.turn.is_set())
        open_shares.remove(first)
        budget.leave(first)
    assert budget.held_bytes == 0
