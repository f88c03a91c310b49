"""Grammars as values: what the wire has comes back, and nothing beyond its bounds comes in."""

from dataclasses import replace

import pytest

from isthmus.proto import common_pb2
from isthmus.proto.common_pb2 import Choices, SamplingParams
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.grammar import MAX_CHOICES, MAX_GRAMMAR_BYTES, Grammar
from isthmus.proto.sampling import Sampling

EACH = [
    Grammar(kind="json_object"),
    Grammar(kind="json_schema", text="{}"),
    Grammar(kind="regex", text="é+"),
    Grammar(kind="choices", choices=("yes", "no", "")),
    Grammar(kind="lark", text='start: "a"'),
]


@pytest.mark.parametrize("grammar", EACH, ids=lambda grammar: grammar.kind)
def test_a_grammar_comes_back_as_it_was_sent(grammar: Grammar) -> None:
    assert Grammar.from_pb(grammar.to_pb()) == grammar
    sampling = Sampling(grammar=grammar)
    assert Sampling.from_pb(sampling.to_pb()) == sampling
    assert hash(sampling) == hash(replace(sampling))


def test_none_is_none() -> None:
    assert Sampling.from_pb(SamplingParams()).grammar is None
    assert not Sampling().to_pb().HasField("grammar")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (common_pb2.Grammar(), "a grammar of no kind; allowed: json_object, json_schema, regex, choices, lark"),
        (common_pb2.Grammar(json_object=False), "grammar.json_object is false; allowed: true, or no grammar"),
        (common_pb2.Grammar(regex=""), f"grammar.regex has 0 bytes; allowed: 1 to {MAX_GRAMMAR_BYTES}"),
        (
            common_pb2.Grammar(json_schema="é" * (MAX_GRAMMAR_BYTES // 2 + 1)),
            f"grammar.json_schema has {MAX_GRAMMAR_BYTES + 2} bytes; allowed: 1 to {MAX_GRAMMAR_BYTES}",
        ),
        (common_pb2.Grammar(choices=Choices()), f"grammar.choices has 0 texts; allowed: 1 to {MAX_CHOICES}"),
        (
            common_pb2.Grammar(choices=Choices(texts=["a"] * 1025)),
            f"grammar.choices has 1025 texts; allowed: 1 to {MAX_CHOICES}",
        ),
        (
            common_pb2.Grammar(choices=Choices(texts=["a" * 1024] * 65)),
            f"grammar.choices has {65 * 1024} bytes; allowed: 1 to {MAX_GRAMMAR_BYTES}",
        ),
    ],
)
def test_what_is_out_of_bounds_is_refused(message: common_pb2.Grammar, error: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Sampling.from_pb(SamplingParams(grammar=message))
    assert str(refused.value) == error
