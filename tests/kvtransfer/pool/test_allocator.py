import random

import pytest

from isthmus.kvtransfer.pool.allocator import PageAllocator, Run


def test_takes_one_run_from_the_smallest_gap_that_holds_it():
    allocator = PageAllocator(10)
    first, second, third = (allocator.take(pages) for pages in (4, 1, 2))
    assert (first, second, third) == ((Run(0, 4),), (Run(4, 1),), (Run(5, 2),))
    allocator.give_back(first)
    assert allocator.take(3) == (Run(7, 3),)
    assert allocator.take(2) == (Run(0, 2),)


def test_takes_pieces_where_no_gap_is_large_enough():
    allocator = PageAllocator(6)
    single = [allocator.take(1) for _ in range(6)]
    for index in (0, 2, 3):
        allocator.give_back(single[index])
    assert allocator.take(3) == (Run(2, 2), Run(0, 1))
    assert allocator.take(1) is None


def test_refuses_to_free_a_page_twice():
    allocator = PageAllocator(4)
    runs = allocator.take(2)
    allocator.give_back(runs)
    with pytest.raises(AssertionError, match="page 0 was freed twice"):
        allocator.give_back(runs)


def test_random_use_hands_out_every_page_once():
    rng = random.Random(1)
    allocator, held = PageAllocator(64), []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            allocator.give_back(held.pop(rng.randrange(len(held))))
        elif (runs := allocator.take(rng.randint(1, 12))) is not None:
            held.append(runs)
        allocator.check()
        pages = [page for runs in held for run in runs for page in range(run.first, run.end)]
        assert len(pages) == len(set(pages)) == allocator.in_use
    for runs in held:
        allocator.give_back(runs)
    assert allocator.take(64) == (Run(0, 64),)
