import random

import pytest

from isthmus.kvtransfer.pool.allocator import PageAllocator, Run
from isthmus.kvtransfer.pool.table import PageTable, runs_of


def make_table(pages: int) -> PageTable:
    return PageTable(PageAllocator(pages))


def test_published_pages_stay_for_others_and_go_when_room_is_needed():
    table = make_table(4)
    first = table.take(3)
    assert first == [0, 1, 2]
    for page, name in zip(first, (b"a", b"b"), strict=False):
        table.publish(page, name)
    table.release(first)
    assert (table.cached, table.in_use, table.free) == (2, 0, 4)
    assert table.share(b"a") == 0
    assert table.take(3) == [1, 2, 3], "b is evicted; a is in use"
    assert not table.holds(b"b")
    assert table.take(1) is None
    table.check()


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    table = make_table(3)
    pages = table.take(3)
    assert pages is not None
    for page in pages:
        table.publish(page, bytes([page]))
    table.release(pages)
    table.take(1)
    assert [table.holds(bytes([page])) for page in pages] == [True, True, False]


def test_a_page_with_two_users_stays_until_both_are_gone():
    table = make_table(1)
    table.take(1)
    table.publish(0, b"x")
    assert table.share(b"x") == 0
    table.release([0])
    assert table.take(1) is None
    table.release([0])
    with pytest.raises(KeyError):
        table.release([0])
    assert table.take(1) == [0]


def test_a_second_page_of_the_same_content_is_not_kept():
    table = make_table(2)
    one, other = table.take(1), table.take(1)
    assert one and other
    table.publish(one[0], b"x")
    table.publish(other[0], b"x")
    table.release(other)
    assert table.cached == 0
    assert table.share(b"x") == one[0]


def test_runs_are_as_long_as_the_pages_allow():
    assert runs_of([3, 4, 5, 9, 1, 2]) == (Run(3, 3), Run(9, 1), Run(1, 2))
    assert runs_of([]) == ()


@pytest.mark.parametrize("seed", range(10))
def test_pages_always_add_up(seed):
    rng = random.Random(seed)
    table, held = make_table(20), list[list[int]]()
    for _ in range(500):
        what = rng.randrange(4)
        if what == 0 and (pages := table.take(rng.randint(1, 6))):
            held.append(pages)
        elif what == 1 and held:
            table.publish(rng.choice(rng.choice(held)), bytes([rng.randrange(40)]))
        elif what == 2 and (page := table.share(bytes([rng.randrange(40)]))) is not None:
            held.append([page])
        elif held:
            table.release(held.pop(rng.randrange(len(held))))
        table.check()
        assert table.in_use == len({page for pages in held for page in pages})
    for pages in held:
        table.release(pages)
    assert table.in_use == 0
    assert table.free == 20


def test_the_cache_has_a_limit_and_zero_switches_it_off() -> None:
    for limit, cached in ((2, 2), (0, 0)):
        table = PageTable(PageAllocator(8), limit)
        pages = table.take(4)
        assert pages is not None
        for page in pages:
            table.publish(page, bytes([page]))
        table.release(pages)
        assert (table.cached, table.in_use, table.free, table.empty) == (cached, 0, 8, 8 - cached)
        assert [table.holds(bytes([page])) for page in pages] == [page < cached for page in pages]
        table.check()


def test_a_sequence_grows_behind_its_last_page_where_that_is_free() -> None:
    table = PageTable(PageAllocator(10))
    assert table.take(2) == [0, 1]
    assert table.take(1, after=1) == [2]
    assert table.take(2, after=0) == [3, 4], "page 1 is not free"
