"""Compiles the grammars of requests for one model, off the engine thread."""

import asyncio
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from ..model.grammar.constraint import Constraint
from ..model.grammar.llg import compile_grammar, make_tokenizer
from ..model.grammar.matcher import Matcher
from ..model.model import Model
from ..model.text.tokenizer import Tokenizer
from ..proto.grammar import Grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

KEPT = 32  # compiled grammars: many requests have the same one


class GrammarCompiler:
    """Of one worker. What it needs is made with the first grammar: a second or two, for large vocabularies."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._making = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._keeping = threading.Lock()
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()

    async def constraint(self, grammar: Grammar | None) -> Constraint | None:
        """That of one request, None where it has no grammar; InvalidRequest where it cannot be compiled."""
        return None if grammar is None else await asyncio.to_thread(self.compile, grammar)

    def compile(self, grammar: Grammar) -> Constraint:
        """The same, of a grammar; takes its time."""
        with self._keeping:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = compile_grammar(self._ready(), grammar)
        with self._keeping:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            own = matcher.copy()
        return Constraint(own, self._model.vocab_size, lambda: self._forget(grammar))

    def _ready(self) -> "LLTokenizer":
        with self._making:
            if self._tokenizer is None:
                model, text = self._model, Tokenizer(self._model.path)
                special = text.special_tokens
                self._tokenizer = make_tokenizer(text.vocabulary(), special, model.eos_token_ids, model.vocab_size)
            return self._tokenizer

    def _forget(self, grammar: Grammar) -> None:
        """One that failed may have used up states that its copies share."""
        with self._keeping:
            self._compiled.pop(grammar, None)
