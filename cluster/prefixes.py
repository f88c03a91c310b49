"""What the gateway believes of cached prefixes: which workers were given which pages lately. Pure and bounded.

A page's address covers everything before it, so that a worker that holds page i of a prompt and all pages before it
holds that prefix. Prompts are looked at in steps (`steps_of`): every page near the beginning, every eighth further on.
"""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from ..kvtransfer.hashing import HASH_BYTES

DENSE_PAGES, STRIDE = 8, 8
STEPS_PER_WORKER = 16_384  # a step is 1 to 8 pages: about 8 million tokens of long prompts

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

    def remember(self, row: int, steps: Steps) -> None:
        """A worker was given a prompt; what it was given longest ago is forgotten past STEPS_PER_WORKER."""
        given, bit = self._given.setdefault(row, OrderedDict()), 1 << row
        for _, address in reversed(steps):  # the beginning of a prompt is forgotten last
            if address in given:
                given.move_to_end(address)
            else:
                given[address] = None
                self._rows[address] = self._rows.get(address, 0) | bit
        while len(given) > STEPS_PER_WORKER:
            self._drop(given.popitem(last=False)[0], bit)

    def forget(self, row: int) -> None:
        """A worker is gone, or was started anew."""
        for address in self._given.pop(row, ()):
            self._drop(address, 1 << row)

    def match(self, steps: Steps, rows: int) -> NDArray[np.float64] | None:
        """Tokens of the longest prefix that each of `rows` workers was given, [rows]; None where nobody was."""
        alive, levels = -1, []
        for tokens, address in steps:
            holders = self._rows.get(address, 0) & alive
            if not holders:
                break
            if levels and holders == alive:
                levels.pop()
            levels.append((tokens, holders))
            alive = holders
        if not levels:
            return None
        matched = np.zeros(rows)
        for tokens, holders in levels:
            matched[_bits(holders, rows)] = tokens
        return matched

    def _drop(self, address: bytes, bit: int) -> None:
        left = self._rows[address] & ~bit
        if left:
            self._rows[address] = left
        else:
            del self._rows[address]


def _bits(mask: int, rows: int) -> NDArray[np.bool_]:
    raw = np.frombuffer(mask.to_bytes((rows + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(raw, count=rows, bitorder="little").view(np.bool_)
