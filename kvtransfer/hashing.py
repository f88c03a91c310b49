"""Content addresses of pages: what a page holds, for whom, and how it is encoded, in 16 bytes.

The hash of a page covers everything before it (a chain), the model, the codec with its parameters and the tenant, so
that two pages with the same hash may stand for each other. Addresses decide whose KV answers whom: they are BLAKE2b,
which nobody can forge a collision for, and not one of the faster checksums that guard single frames.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from ..proto.errors import InvalidRequest

HASH_BYTES = 16
SCOPE_BYTES = 16


def page_salt(model_fingerprint: str, codec: str, codec_hash: str, tenant: str = "", scope: bytes = b"") -> bytes:
    """The start of the chain: everything that pages depend on besides the tokens.

    `scope`: SCOPE_BYTES that are one request's own, whose pages no other one is to find; empty: the tenant's share.
    """
    parts = (model_fingerprint, codec, codec_hash, tenant, *([scope.hex()] if scope else []))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=HASH_BYTES).digest()


def checked_scope(scope: bytes) -> bytes:
    """The same; InvalidRequest where it is neither empty nor of SCOPE_BYTES."""
    if len(scope) not in (0, SCOPE_BYTES):
        raise InvalidRequest(f"prefix_scope has {len(scope)} bytes; allowed: none, or {SCOPE_BYTES}")
    return scope


def page_hashes(token_ids: Sequence[int], page_tokens: int, salt: bytes) -> bytes:
    """The hashes of all full pages of a prompt, HASH_BYTES each, one after the other.

    A page that is still filling has no hash.
    """
    tokens = np.asarray(token_ids, dtype="<u4")
    hashes, last = bytearray(), salt
    for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
        page = tokens[start : start + page_tokens].tobytes()
        last = hashlib.blake2b(last + page, digest_size=HASH_BYTES).digest()
        hashes += last
    return bytes(hashes)


def prompt_hash(token_ids: Sequence[int], salt: bytes) -> bytes:
    """One hash over a whole prompt, its partial page included: binds frames to the prompt they belong to."""
    return hashlib.blake2b(salt + np.asarray(token_ids, dtype="<u4").tobytes(), digest_size=HASH_BYTES).digest()


def hash_of_page(hashes: bytes, page: int) -> bytes:
    """The hash of one page out of those of a prompt."""
    return hashes[page * HASH_BYTES : (page + 1) * HASH_BYTES]


class PageAddresses:
    """The addresses of one sequence's full pages; each page is hashed once, when it is first asked for."""

    def __init__(self, salt: bytes, page_tokens: int) -> None:
        self._last, self._page_tokens = salt, page_tokens
        self._addresses: list[bytes] = []

    def first(self, pages: int, token_ids: Sequence[int]) -> list[bytes]:
        """Of the first `pages` pages of a sequence that starts with `token_ids`, which hold that many pages."""
        done = len(self._addresses)
        if pages > done:
            fresh = page_hashes(
                token_ids[done * self._page_tokens : pages * self._page_tokens], self._page_tokens, self._last
            )
            assert len(fresh) == (pages - done) * HASH_BYTES, "a page that is still filling has no address"
            self._addresses += [fresh[at : at + HASH_BYTES] for at in range(0, len(fresh), HASH_BYTES)]
            self._last = self._addresses[-1]
        return self._addresses[:pages]
