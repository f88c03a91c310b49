"""Token ids of a text in which some control tokens are marked as text (`chat_template.py`).

The text is encoded in pieces, as transformers does it for `sanitize_control_tokens`: a marked token by the steps of the
tokenizer that come after the search for added tokens, all between two marked ones as usual.
"""

import re
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer as Backend

from ...proto.errors import InvalidRequest
from .marks import END, START

_BATCH = 512  # pieces encoded in one call; their results are made into Python objects under the interpreter's lock


class MarkedText:
    """Encodes texts with marks for one tokenizer. Any thread may use it."""

    def __init__(self, backend: Backend, control_tokens: Sequence[str]) -> None:
        """`control_tokens`: the longest first."""
        self._backend = backend
        tokens = "|".join(map(re.escape, control_tokens)) or "(?!)"
        self._marks = re.compile(f"{START}({tokens}){END}|[{START}{END}]")
        self._newline: list[int] = backend.encode("\n", add_special_tokens=False).ids
        self._control_ids = {backend.token_to_id(token) for token in control_tokens}
        self._as_text: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids, without special tokens around them. InvalidRequest where a marked token cannot be text."""
        pieces = self._marks.split(text)  # text, marked token (None for a lone mark), text, ...
        ids = self._backend.encode_batch_fast([pieces[0]], add_special_tokens=False)[0].ids
        for start in range(1, len(pieces), 2 * _BATCH):
            some = pieces[start : start + 2 * _BATCH]
            for token, between in zip(some[::2], self._encode_between(some[1::2]), strict=True):
                ids += self._spelled(token) if token else []
                ids += between
        return ids

    def _encode_between(self, pieces: Sequence[str]) -> Iterator[list[int]]:
        """Of pieces in the middle of a text: after a newline, for some tokenizers begin a text with a space."""
        encoded = self._backend.encode_batch_fast([f"\n{piece}" for piece in pieces], add_special_tokens=False)
        for piece, found in zip(pieces, encoded, strict=True):
            if not piece:
                yield []
            elif found.ids[: len(self._newline)] == self._newline:
                yield found.ids[len(self._newline) :]
            else:  # the newline became one with the piece
                yield self._backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids

    def _spelled(self, token: str) -> list[int]:
        """The ids of a control token's letters."""
        if (known := self._as_text.get(token)) is None:
            ids = self._after_newline(token)
            if not self._control_ids.isdisjoint(ids):  # a tokenizer that finds whole words
                ids = [found for char in token for found in self._after_newline(char)]
            if not self._control_ids.isdisjoint(ids):
                raise InvalidRequest(f"the text has {token!r}, which the model's tokenizer cannot take as text")
            known = self._as_text[token] = ids
        return known

    def _after_newline(self, text: str) -> list[int]:
        ids = self._plain(f"\n{text}")
        return ids[len(self._newline) :] if ids[: len(self._newline)] == self._newline else self._plain(text)

    def _plain(self, text: str) -> list[int]:
        """What the tokenizer makes of a text in which it looks for no added tokens."""
        backend = self._backend
        if backend.normalizer:
            text = backend.normalizer.normalize_str(text)
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        return [token.id for word in words for token in backend.model.tokenize(word)]
