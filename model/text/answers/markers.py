"""Tokens without a text of their own that mark what follows, in the text where they were."""

import codecs
from collections import deque
from collections.abc import Mapping, Sequence

from ..tokenizer import Tokenizer


class MarkedOutput:
    """The text of one output with the names of some special tokens in it.

    The text may come later than its tokens, and end before them: stop strings hold it back and cut it.
    """

    def __init__(self, tokenizer: Tokenizer, markers: Mapping[int, str]) -> None:
        """`markers`: the tokens to put in, and their names."""
        self._tokenizer, self._markers = tokenizer, markers
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoded = 0  # characters of all tokens so far
        self._given = 0  # characters of all text so far
        self._waiting: deque[tuple[int, str]] = deque()  # names, and how many characters stand before each

    def push(self, text: str, token_ids: Sequence[int]) -> str:
        """More of the text, which is that of `token_ids` and of tokens before them."""
        for token in token_ids:
            if (name := self._markers.get(token)) is not None:
                self._waiting.append((self._decoded, name))
            else:
                self._decoded += len(self._decoder.decode(self._tokenizer.bytes_of(token)))
        pieces = []
        while self._waiting and self._waiting[0][0] <= self._given + len(text):
            place, name = self._waiting.popleft()
            before = place - self._given
            pieces += [text[:before], name]
            text, self._given = text[before:], place
        self._given += len(text)
        return "".join([*pieces, text])
