"""What one output may go on with: a function of its tokens so far, and of nothing else.

So a request that a lost decode worker had begun goes on elsewhere, and one whose step failed is asked once more.
"""

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from .matcher import Matcher

log = logging.getLogger(__name__)


class Constraint:
    """The grammar of one request. Any thread may ask; a second one that does waits for the first one's answer."""

    def __init__(self, matcher: Matcher, vocab_size: int, on_failure: Callable[[], None]) -> None:
        """`matcher` is this request's own. `on_failure` is called once, if it comes to an end before its output."""
        self._matcher, self._on_failure = matcher, on_failure
        self._lock = threading.Lock()
        self._consumed = 0  # tokens of the output
        self._known = -1  # of how many tokens `_bits_W` is the answer: the same, but for the beginning
        self._bits_W = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        self._failure: str | None = None

    def allowed(self, output: Sequence[int]) -> np.ndarray | None:
        """Bits int32 [W] of the tokens that may follow this output, the first token's lowest; None where that is not
        known any more (`refusal` says why). `output` goes on from what it was at the last call.

        They are good until a call for a longer output.
        """
        with self._lock:
            if self._failure is None and self._known != len(output):
                self._follow(output)
            return None if self._failure is not None else self._bits_W

    def refusal(self, output: Sequence[int], token_id: int) -> str | None:
        """Why `token_id` cannot follow this output, in one line; None where it can."""
        bits_W = self.allowed(output)
        if bits_W is None:
            return self._failure
        word, bit = divmod(token_id, 32)
        if word < len(bits_W) and bits_W[word] >> bit & 1:
            return None
        return f"the model's numbers led to token {token_id}, which the grammar does not allow"

    def _follow(self, output: Sequence[int]) -> None:
        assert self._consumed <= len(output), "an output does not become shorter"
        try:
            if self._consumed < len(output):
                self._matcher.consume(list(output[self._consumed :]))
            if self._matcher.error() is None:
                self._matcher.fill(self._bits_W)
            self._failure = self._matcher.error()
        except Exception as error:  # of foreign code, over the grammar of one request
            log.exception("a grammar failed")
            self._failure = f"the output cannot go on within the grammar: {type(error).__name__}"
        self._consumed = self._known = len(output)
        if self._failure is not None:
            self._on_failure()
