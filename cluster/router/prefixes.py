"""What the gateway believes of cached prefixes: which workers were given which pages lately. Pure and bounded.

A page's address covers everything before it, so that a worker that holds page i of a prompt and all pages before it
holds that prefix. Prompts are looked at in steps (`steps_of`): every page near the beginning, every eighth further on.
"""

from collections import OrderedDict
from functools import lru_cache

import numpy as np

from ...kvtransfer.hashing import HASH_BYTES

DENSE_PAGES, STRIDE = 8, 8
STEPS_PER_WORKER = 16_384  # at most; a step is 1 to 8 pages: about 8 million tokens of long prompts
STEPS_IN_ALL = 1 << 20  # of all workers of a pool: about 256 MiB, which many workers share evenly
STEP_BYTES = 256  # of one, in the tables below
FEW = 8  # rows: so many are handled one by one, more as vectors

Steps = tuple[tuple[int, bytes], ...]  # (tokens up to there, address of the page that ends there), ascending


def steps_of(hashes: bytes, page_tokens: int) -> Steps:
    """The steps of a prompt with these page hashes."""
    pages = len(hashes) // HASH_BYTES
    chosen = [*range(1, min(pages, DENSE_PAGES) + 1), *range(DENSE_PAGES + STRIDE, pages + 1, STRIDE)]
    return tuple((page * page_tokens, hashes[(page - 1) * HASH_BYTES : page * HASH_BYTES]) for page in chosen)


class Prefixes:
    """The workers of one pool by the addresses they were given; a worker is a row of the pool."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}  # address -> set of rows, as bits
        self._given: dict[int, OrderedDict[bytes, None]] = {}  # row -> addresses, the oldest first
        self.steps = 0  # that are remembered, of all workers

    def remember(self, row: int, steps: Steps) -> None:
        """A worker was given a prompt; what it was given longest ago is forgotten past its share of steps."""
        given, bit = self._given.setdefault(row, OrderedDict()), 1 << row
        for _, address in reversed(steps):  # the beginning of a prompt is forgotten last
            if address in given:
                given.move_to_end(address)
            else:
                given[address] = None
                self.steps += 1
                self._rows[address] = self._rows.get(address, 0) | bit
        share = min(STEPS_PER_WORKER, STEPS_IN_ALL // len(self._given))
        self._trim(row, share)
        if self.steps > STEPS_IN_ALL:  # a worker is new, and the others' shares are smaller now
            for other in self._given:
                self._trim(other, share)

    def forget(self, row: int) -> None:
        """A worker is gone, or was started anew."""
        for address in self._given.pop(row, ()):
            self._drop(address, 1 << row)

    def match(self, steps: Steps) -> dict[int, float]:
        """The tokens of the longest prefix that each row was given, for the rows that were given any.

        Whoever was given a step was given all before it and forgets it before these, so that along a prompt the rows
        become fewer: where they do is found by bisection, however long the prompt is.
        """
        holders = self._rows
        everybody = holders.get(steps[0][1]) if steps else None
        if everybody is None:
            return {}
        low, high = 1, len(steps)
        while low < high:  # how many steps somebody was given
            middle = (low + high + 1) >> 1
            if steps[middle - 1][1] in holders:
                low = middle
            else:
                high = middle - 1
        tokens, address = steps[low - 1]
        mask = holders[address]
        matched: dict[int, float] = dict.fromkeys(_rows_of(mask), tokens)
        while mask != everybody:
            seen, low, high = mask, 1, low - 1
            while low < high:  # how many steps more rows were given
                middle = (low + high + 1) >> 1
                if holders[steps[middle - 1][1]] == seen:
                    high = middle - 1
                else:
                    low = middle
            tokens, address = steps[low - 1]
            mask = holders[address]
            for row in _rows_of(mask ^ seen):
                matched[row] = tokens
        return matched

    def _trim(self, row: int, share: int) -> None:
        given, bit = self._given[row], 1 << row
        while len(given) > share:
            self._drop(given.popitem(last=False)[0], bit)

    def _drop(self, address: bytes, bit: int) -> None:
        self.steps -= 1
        left = self._rows[address] & ~bit
        if left:
            self._rows[address] = left
        else:
            del self._rows[address]


@lru_cache(1024)
def _rows_of(mask: int) -> tuple[int, ...]:
    """The bits that are set. Many prompts begin with what the same workers were given, hence the cache."""
    raw = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), dtype=np.uint8)
    return tuple(np.unpackbits(raw, bitorder="little").nonzero()[0].tolist())
