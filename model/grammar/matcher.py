"""What a grammar engine has to be able to do: an interface of four methods. `llg.py` is the one there is."""

from typing import Protocol, Self

import numpy as np


class Matcher(Protocol):
    """Follows one output through its grammar. One thread at a time."""

    def copy(self) -> Self:
        """One that goes on from here by itself."""
        ...

    def consume(self, token_ids: list[int]) -> None:
        """The output goes on with these."""
        ...

    def fill(self, bits_W: np.ndarray) -> None:
        """Sets the bits of the tokens that may come next, the first token's lowest: int32 [W], a bit a token."""
        ...

    def error(self) -> str | None:
        """What is wrong, in one line: the grammar became too complex, or the output left it. It stays so."""
        ...
