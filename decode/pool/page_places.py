"""Where the KV of the tokens of one step lies in the packed pool, as attention reads it.

Each token is a sequence of its own for the kernel, so that one call serves steps and chunks alike. Letters of tensor
shapes: B tokens, N pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_NUMBERS = 4  # of each token, beside its pages


class TokenPlace(NamedTuple):
    """Where one token's KV goes, and what it sees."""

    row: int  # of the raw pool: slot * page tokens + offset
    packed_from: int  # pages [from, to) are packed, all others raw
    packed_to: int
    length: int  # tokens, itself among them
    slots: Sequence[int]  # of the pages that hold these


@dataclass(frozen=True)
class PagePlaces:
    """The places of B tokens with up to N pages each: int32, views of one buffer that moves in one copy."""

    numbers: Tensor  # [4, B]: the rows are those of `TokenPlace`
    table_BN: Tensor

    @staticmethod
    def size(tokens: int, pages: int) -> int:
        """Integers in the buffer."""
        return _NUMBERS * _aligned(tokens) + tokens * pages

    @classmethod
    def over(cls, buffer: Tensor, tokens: int, pages: int) -> "PagePlaces":
        """The views of the first `size(tokens, pages)` integers of a buffer."""
        wide = _aligned(tokens)
        table = buffer[_NUMBERS * wide :][: tokens * pages]
        return cls(buffer[: _NUMBERS * wide].view(_NUMBERS, wide)[:, :tokens], table.view(tokens, pages))

    @classmethod
    def of(cls, places: Sequence[TokenPlace], device: torch.device) -> "PagePlaces":
        """Of just these tokens."""
        shape = len(places), max(len(place.slots) for place in places)
        buffer = torch.zeros(cls.size(*shape), dtype=torch.int32)
        cls.over(buffer, *shape).fill(places)
        return cls.over(buffer.to(device), *shape)

    def fill(self, places: Sequence[TokenPlace], rest: TokenPlace | None = None) -> None:
        """Writes the places of tokens, and `rest` for those up to B; in host memory."""
        numbers, table_BN = self.numbers.numpy(), self.table_BN.numpy()
        for index, place in enumerate(places):
            table_BN[index, : len(place.slots)] = place.slots
        if places:
            numbers[:, : len(places)] = np.array([place[:_NUMBERS] for place in places], dtype=np.int32).T
        if rest is not None and len(places) < len(table_BN):
            numbers[:, len(places) :] = np.array(rest[:_NUMBERS], dtype=np.int32)[:, None]
            table_BN[len(places) :, : len(rest.slots)] = rest.slots

    @property
    def rows_B(self) -> Tensor:
        return self.numbers[0]

    @property
    def packed_from_B(self) -> Tensor:
        return self.numbers[1]

    @property
    def packed_to_B(self) -> Tensor:
        return self.numbers[2]

    @property
    def lengths_B(self) -> Tensor:
        return self.numbers[3]


def _aligned(tokens: int) -> int:
    """So many that what follows lies at a multiple of 16 bytes, for which Triton compiles faster loads."""
    return -(-tokens // 4) * 4
