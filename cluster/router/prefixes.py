"""Which workers were given which prompt prefixes lately, as far as the gateway knows. Pure and bounded.

The hash of a page covers everything before it, so that a worker that has page i of a prompt and all pages before it has
that prefix. A prompt is represented by some of its page hashes, its prefix keys (`prefix_keys_of`): every page near the
beginning, every eighth further on.
"""

from collections import OrderedDict
from functools import lru_cache

import numpy as np

from ...kvtransfer.hashing import HASH_BYTES

DENSE_PAGES, STRIDE = 8, 8
KEYS_PER_WORKER = 16_384  # at most; a key stands for 1 to 8 pages: about 8 million tokens of long prompts
MAX_KEYS = 1 << 20  # of all workers of a role: about 256 MiB, which many workers share evenly
KEY_BYTES = 256  # of one, in the dictionaries below
FEW_ROWS = 8  # so many are handled one by one, more as vectors

PrefixKeys = tuple[tuple[int, bytes], ...]  # (tokens up to there, hash of the page that ends there), ascending


def prefix_keys_of(hashes: bytes, page_tokens: int) -> PrefixKeys:
    """The prefix keys of a prompt with these page hashes."""
    pages = len(hashes) // HASH_BYTES
    chosen = [*range(1, min(pages, DENSE_PAGES) + 1), *range(DENSE_PAGES + STRIDE, pages + 1, STRIDE)]
    return tuple((page * page_tokens, hashes[(page - 1) * HASH_BYTES : page * HASH_BYTES]) for page in chosen)


class PrefixIndex:
    """The workers of one role by the prefix keys of the prompts that they were given; a worker is a row."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}  # page hash -> set of rows, as bits
        self._given: dict[int, OrderedDict[bytes, None]] = {}  # row -> page hashes, the oldest first
        self.key_count = 0  # remembered keys, of all workers

    def remember(self, row: int, keys: PrefixKeys) -> None:
        """A worker was given a prompt; past its share of keys, those that it was given longest ago are forgotten."""
        given, bit = self._given.setdefault(row, OrderedDict()), 1 << row
        for _, page_hash in reversed(keys):  # the beginning of a prompt is forgotten last
            if page_hash in given:
                given.move_to_end(page_hash)
            else:
                given[page_hash] = None
                self.key_count += 1
                self._rows[page_hash] = self._rows.get(page_hash, 0) | bit
        share = min(KEYS_PER_WORKER, MAX_KEYS // len(self._given))
        self._trim(row, share)
        if self.key_count > MAX_KEYS:  # a worker is new, and the others' shares are smaller now
            for other in self._given:
                self._trim(other, share)

    def forget(self, row: int) -> None:
        """A worker is gone, or was started anew."""
        for page_hash in self._given.pop(row, ()):
            self._drop(page_hash, 1 << row)

    def match(self, keys: PrefixKeys) -> dict[int, float]:
        """The tokens of the longest prefix that each row was given, for the rows that were given any.

        A worker that was given one key was given all before it and forgets it before these, so that along a prompt the
        rows become fewer: where they do is found by bisection, however long the prompt is.
        """
        holders = self._rows
        everybody = holders.get(keys[0][1]) if keys else None
        if everybody is None:
            return {}
        low, high = 1, len(keys)
        while low < high:  # how many keys at least one row was given
            middle = (low + high + 1) >> 1
            if keys[middle - 1][1] in holders:
                low = middle
            else:
                high = middle - 1
        tokens, page_hash = keys[low - 1]
        mask = holders[page_hash]
        matched: dict[int, float] = dict.fromkeys(_rows_of(mask), tokens)
        while mask != everybody:
            seen, low, high = mask, 1, low - 1
            while low < high:  # how many keys more rows were given
                middle = (low + high + 1) >> 1
                if holders[keys[middle - 1][1]] == seen:
                    high = middle - 1
                else:
                    low = middle
            tokens, page_hash = keys[low - 1]
            mask = holders[page_hash]
            for row in _rows_of(mask ^ seen):
                matched[row] = tokens
        return matched

    def _trim(self, row: int, share: int) -> None:
        given, bit = self._given[row], 1 << row
        while len(given) > share:
            self._drop(given.popitem(last=False)[0], bit)

    def _drop(self, page_hash: bytes, bit: int) -> None:
        self.key_count -= 1
        left = self._rows[page_hash] & ~bit
        if left:
            self._rows[page_hash] = left
        else:
            del self._rows[page_hash]


@lru_cache(1024)
def _rows_of(mask: int) -> tuple[int, ...]:
    """The bits that are set. Many prompts begin with what the same workers were given, hence the cache."""
    raw = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), dtype=np.uint8)
    return tuple(np.unpackbits(raw, bitorder="little").nonzero()[0].tolist())
