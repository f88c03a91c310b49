import random

import pytest

from isthmus.kvtransfer.encoded import EncodedPage, PageKey
from isthmus.kvtransfer.pool.cache import PageCache


def make_page(name: str, size: int = 100) -> EncodedPage:
    return EncodedPage(PageKey(name.encode(), "packed"), "packed", 64, (0, size), memoryview(bytes(size)))


def key(name: str) -> PageKey:
    return PageKey(name.encode(), "packed")


def test_the_page_unused_for_longest_goes_first():
    cache = PageCache(300)
    for name in "abc":
        cache.release([cache.add(make_page(name))])
    used = cache.take(key("a"))
    assert used is not None
    cache.release([used])
    cache.release([cache.add(make_page("d"))])
    assert [key(name) in cache for name in "abcd"] == [True, False, True, True]
    assert (cache.bytes, cache.evicted) == (300, 1)


def test_a_page_that_is_being_sent_is_never_evicted():
    cache = PageCache(150)
    sending = [cache.add(make_page("a")), cache.add(make_page("b"))]
    assert (len(cache), cache.bytes) == (2, 200), "over the bound, and both are needed"
    cache.release(sending[:1])
    assert (key("a") in cache, key("b") in cache) == (False, True)
    cache.release(sending[1:])
    assert key("b") in cache


def test_the_same_content_is_kept_once():
    cache = PageCache(1000)
    first, second = make_page("a"), make_page("a")
    assert cache.add(first) is first
    assert cache.add(second) is first
    assert cache.bytes == 100
    cache.release([first, first])
    with pytest.raises(AssertionError):
        cache.release([first])


def test_raw_and_packed_forms_are_two_pages():
    cache = PageCache(1000)
    cache.add(make_page("a"))
    assert cache.take(PageKey(b"a", "bf16")) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_whenever_nothing_is_pinned(seed):
    rng = random.Random(seed)
    cache, pinned = PageCache(1000), []
    for _ in range(500):
        if rng.random() < 0.6:
            pinned.append(cache.add(make_page(str(rng.randrange(40)), 10 + rng.randrange(200))))
        elif pinned:
            cache.release([pinned.pop(rng.randrange(len(pinned)))])
    cache.release(pinned)
    assert cache.pinned == 0
    assert 0 < cache.bytes <= 1000
