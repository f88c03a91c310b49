"""The addresses of a sequence that grows."""

from collections.abc import Sequence

from .hashing import HASH_BYTES, page_hashes


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
