"""llguidance behind `Matcher`. It is imported with the first grammar: few requests have one, and workers start fast.

Its tokenizer is made of the bytes that our detokenizer gives a client for each token, so what is matched is what the
client reads, whatever tokenizer the model has. Special tokens are no text: a grammar that spells one gets the letters.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from ...proto.errors import InvalidRequest
from ...proto.grammar import Grammar
from .source import lark_of, refused

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# 20,000 states of a lexer are 40 MB at most. A step's items are what makes a mask of an ambiguous grammar slow.
MAX_LEXER_STATES = 20_000
MAX_GRAMMAR_SIZE = 100_000
MAX_STEP_ITEMS = 10_000


class LlgMatcher:
    """A `Matcher`."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def copy(self) -> Self:
        return type(self)(self._matcher.deep_copy())

    def consume(self, token_ids: list[int]) -> None:
        self._matcher.consume_tokens(token_ids)

    def fill(self, bits_W: np.ndarray) -> None:
        """Without Python's lock."""
        self._matcher.unsafe_compute_mask_ptr(bits_W.ctypes.data, bits_W.nbytes)

    def error(self) -> str | None:
        if not self._matcher.is_error():
            return None
        return f"the output cannot go on within the grammar: {self._matcher.get_error().partition(chr(10))[0]}"


class _Vocabulary:
    """What `TokenizerWrapper` of llguidance asks for."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end

    def __call__(self, text: str | bytes) -> list[int]:
        """Nothing is tokenized: see `source.py`."""
        return []


def make_tokenizer(
    token_bytes: Sequence[bytes], special: Mapping[int, str], end_ids: frozenset[int], vocab_size: int
) -> "LLTokenizer":
    """The tokens of a model, which may have more than its tokenizer: such are never allowed.

    InvalidRequest where the model has no token that ends an output, or llguidance is not installed.
    """
    if not end_ids:
        raise InvalidRequest("the model has no end-of-sequence token, so no output could end; allowed: no grammar")
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise InvalidRequest(f"no grammars here: the package llguidance cannot be imported ({error})") from None
    tokens = [*token_bytes, *[b""] * (vocab_size - len(token_bytes))]
    ends = sorted(end for end in end_ids if end < len(tokens))
    for token in {*special, *ends}:
        tokens[token] = special.get(token, f"<{token}>").encode()
    vocabulary = _Vocabulary(tokens, sorted({*special, *ends}), ends[0])
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=ends)


def compile_grammar(tokenizer: "LLTokenizer", grammar: Grammar) -> LlgMatcher:
    """A matcher at the beginning of an output; InvalidRequest, with llguidance's reason, where there can be none."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SIZE,
        step_max_items=MAX_STEP_ITEMS,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, lark_of(grammar), limits=limits, log_level=0)
    if matcher.is_error():
        raise refused(grammar, matcher.get_error())
    return LlgMatcher(matcher)
