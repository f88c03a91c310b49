import pytest

from isthmus.kvtransfer.hashing import (
    HASH_BYTES,
    PageAddresses,
    checked_scope,
    page_hashes,
    page_salt,
    prompt_hash,
)
from isthmus.proto.errors import InvalidRequest

SALT = page_salt("model", "tq-k4v4", "abc")


def split(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def test_a_page_that_is_still_filling_has_no_hash():
    assert page_hashes(range(63), 64, SALT) == b""
    assert len(split(page_hashes(range(130), 64, SALT))) == 2


def test_prompts_share_the_hashes_of_their_common_pages_only():
    one, other = list(range(192)), list(range(192))
    other[100] += 1
    first, second = (split(page_hashes(tokens, 64, SALT)) for tokens in (one, other))
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert first[2] != second[2], "a page's hash covers all pages before it"


def test_everything_that_pages_depend_on_is_in_the_salt():
    salts = {
        page_salt("model", "tq-k4v4", "abc"),
        page_salt("other", "tq-k4v4", "abc"),
        page_salt("model", "raw", "abc"),
        page_salt("model", "tq-k4v4", "abd"),
        page_salt("model", "tq-k4v4", "abc", tenant="t"),
    }
    assert len(salts) == 5
    assert len({page_hashes(range(64), 64, salt) for salt in salts}) == 5


def test_the_prompt_hash_covers_the_partial_page():
    assert prompt_hash([1, 2, 3], SALT) != prompt_hash([1, 2, 4], SALT)
    assert prompt_hash([1, 2, 3], SALT) == prompt_hash((1, 2, 3), SALT)


def test_addresses_grow_with_the_sequence():
    tokens = list(range(40))
    addresses = PageAddresses(b"salt", 8)
    assert len(addresses.first(2, tokens[:20])) == 2
    assert b"".join(addresses.first(5, tokens)) == page_hashes(tokens, 8, b"salt")
    assert addresses.first(1, tokens) == addresses.first(5, tokens)[:1]


def test_the_pages_of_a_scope_are_its_own():
    scopes = [b"", b"\0" * 16, b"\1" * 16]
    assert len({page_salt("m", "raw", "h", "t", scope) for scope in scopes}) == 3
    assert page_salt("m", "raw", "h", "t", b"") == page_salt("m", "raw", "h", "t")
    assert [checked_scope(scope) for scope in scopes] == scopes
    for scope in (b"x", b"x" * 15, b"x" * 17):
        with pytest.raises(InvalidRequest, match="allowed: none, or 16"):
            checked_scope(scope)
