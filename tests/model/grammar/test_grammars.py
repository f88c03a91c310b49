"""Grammars of every kind against a vocabulary of single bytes: what may come, what is refused, and why."""

import json

import numpy as np
import pytest
import torch

from isthmus.model.grammar.constraint import Constraint
from isthmus.model.grammar.llg import compile_grammar, make_tokenizer
from isthmus.model.grammar.masking import MaskThread, mask
from isthmus.model.sampling import SampleRow, sample
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.grammar import Grammar
from isthmus.proto.sampling import Sampling

# Bytes, then an end, a start of a turn, and a word that begins with what the byte 'a' is.
END, TURN, WORD, VOCABULARY = 256, 257, 258, 300
TOKENIZER = make_tokenizer(
    [*(bytes([byte]) for byte in range(256)), b"", b"", b"ab\xc3"],
    {END: "<end>", TURN: "<turn>"},
    frozenset({END}),
    VOCABULARY,
)


def constraint(kind: str, text: object = "", choices: tuple[str, ...] = ()) -> Constraint:
    text = text if isinstance(text, str) else json.dumps(text)
    grammar = Grammar(kind=kind, text=text, choices=choices)  # pyright: ignore[reportArgumentType]
    return Constraint(compile_grammar(TOKENIZER, grammar), VOCABULARY, lambda: None)


def allowed(of: Constraint, output: bytes | list[int]) -> list[int]:
    bits = of.allowed(list(output))
    assert bits is not None
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def matches(of: Constraint, text: str) -> bool:
    """Whether an output may be this text, and end there."""
    output: list[int] = []
    for byte in text.encode():
        if byte not in allowed(of, output):
            return False
        output.append(byte)
    return END in allowed(of, output)


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json_object", "", ["{}", '{"a": [1, null]}', '{\n "é":1}'], ["[]", "1", " {}", '{"a"}']),
        ("json_schema", {"type": "integer", "minimum": 5}, ["5", "12345678901234567890123"], ["4", "5.0", "-6", "05"]),
        ("json_schema", {"enum": ["<turn>", 1, None]}, ['"<turn>"', "1", "null"], ["2", '"<end>"']),
        ("json_schema", {}, ["[]", '"a"', "-0.5e3"], ["", "nul", "NaN"]),
        ("regex", "[a-c]+/é|", ["ab/é", ""], ["/é", "ab/"]),
        ("regex", r"^\d{2}$", ["12"], ["1", "123"]),
        ("lark", "start: number\nnumber: /[0-9]+/ // a comment at the end", ["12"], ["a"]),
    ],
)
def test_what_a_grammar_matches(kind: str, text: object, good: list[str], bad: list[str]) -> None:
    for one in good:
        assert matches(constraint(kind, text), one), one
    for one in bad:
        assert not matches(constraint(kind, text), one), one


def test_choices_are_these_texts_and_no_pattern() -> None:
    texts = ('a.b"c\\', "é\n\u2028", "<turn>", "[x]", "<turn> ", "\x01")
    for text in texts:
        assert matches(constraint("choices", choices=texts), text)
    for text in ('axb"c\\', "<turn", "x", ""):
        assert not matches(constraint("choices", choices=texts), text)


def test_a_control_token_that_a_grammar_spells_is_letters_and_one_that_it_names_is_the_token() -> None:
    assert allowed(constraint("choices", choices=("<turn>", "<end>")), b"") == [ord("<")]
    assert allowed(constraint("lark", "start: <turn>"), b"") == [TURN]
    assert TURN not in allowed(constraint("regex", "(?s:.)*"), b"")


def test_a_token_may_be_many_bytes_and_end_within_a_character() -> None:
    assert allowed(constraint("regex", "abé"), b"") == [ord("a"), WORD]
    assert allowed(constraint("regex", "abé"), [WORD]) == ["é".encode()[1]]
    assert allowed(constraint("regex", "abe"), b"") == [ord("a")]


def test_whitespace_of_json_is_bounded() -> None:
    of = constraint("json_object")
    assert ord(" ") in allowed(of, b"{" + b" " * 63)
    assert ord(" ") not in allowed(of, b"{" + b" " * 64)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", {"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ("json_schema", {"properties": {"a": {"not": {}}}}, 'Unimplemented keys: ["not"]'),
        ("json_schema", {"type": "string", "format": "ipv7"}, "Unknown format: ipv7"),
        ("json_schema", {"$ref": "http://example.com/a"}, "Resource 'http://example.com/a' is not present"),
        ("json_schema", {"type": "nothing"}, "Invalid type: nothing"),
        ("regex", "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("lark", "start: a", 'at 1(8): unknown name: "a"'),
        ("lark", "start: <nobody>", 'unknown special token: "<nobody>"'),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_reason(kind: str, text: object, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        constraint(kind, text)
    assert str(refused.value).startswith(f"grammar.{kind} cannot be compiled: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[", "grammar.json_schema cannot be read: Expecting value: line 1 column 2 (char 1)"),
        ('{"items":' * 20_000, "grammar.json_schema cannot be read: too deeply nested"),
        ("true", "grammar.json_schema is no JSON object; allowed: a schema, {} for any JSON"),
        ('{"const": NaN}', "grammar.json_schema cannot be read: NaN is no number of JSON"),
        (
            '{"const": 9007199254740993}',
            "grammar.json_schema cannot be read: 9007199254740993 is too large an integer; "
            "allowed: -9007199254740992 to 9007199254740992",
        ),
        ('{"x-guidance": {}}', "x-guidance in grammar.json_schema; allowed: keywords of JSON Schema"),
    ],
)
def test_a_schema_that_is_none_is_refused(text: str, error: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        constraint("json_schema", text)
    assert str(refused.value) == error


def test_a_model_without_an_end_has_no_grammars() -> None:
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        make_tokenizer([b"a"], {}, frozenset(), 1)


def test_the_state_is_a_function_of_the_output() -> None:
    text = b'{"a": [1, {"b": "\xc3\xa9"}]}'
    followed = constraint("json_object")
    for length in range(len(text) + 1):
        replayed = constraint("json_object")
        assert allowed(replayed, text[:length]) == allowed(followed, text[:length]), text[:length]


def test_an_output_that_left_its_grammar_is_refused_from_then_on() -> None:
    failures: list[int] = []
    grammar = Grammar(kind="regex", text="ab")
    of = Constraint(compile_grammar(TOKENIZER, grammar), VOCABULARY, lambda: failures.append(1))
    assert of.refusal([], ord("a")) is None
    assert of.refusal([], ord("b")) == "the model's numbers led to token 98, which the grammar does not allow"
    assert of.refusal([], 10**6) is not None
    assert of.allowed(list(b"ax")) is None
    assert "cannot go on within the grammar" in (of.refusal(list(b"ax"), ord("b")) or "")
    assert of.allowed(list(b"axb")) is None
    assert failures == [1]


def row(of: Constraint | None, output: bytes = b"", **options: object) -> SampleRow:
    sampling = Sampling(**{"temperature": 0, "max_tokens": 100, **options})  # pyright: ignore[reportArgumentType]
    return SampleRow(sampling, [1], list(output), frozenset({END}), constraint=of)


def logits(**best: float) -> torch.Tensor:
    numbers = torch.linspace(0, 1, VOCABULARY)
    for name, value in best.items():
        numbers[{"end": END, "turn": TURN, "last": VOCABULARY - 1}[name] if len(name) > 1 else ord(name)] = value
    return numbers


def test_the_sampling_pass_masks_rows_that_have_a_grammar_and_no_others() -> None:
    rows = [row(constraint("regex", "[ab]")), row(None), row(constraint("regex", "[bc]"), temperature=1.5, seed=3)]
    table = torch.stack([logits(z=9, a=5), logits(z=9), logits(last=99, c=50)])
    before = table.clone()
    assert [drawn.token_id for drawn in sample(table, rows)] == [ord("a"), ord("z"), ord("c")]
    assert torch.equal(table, before)


def test_limits_and_penalties_work_on_what_is_left() -> None:
    options = {"temperature": 1, "top_k": 1, "repetition_penalty": 2.0}
    rows = [row(constraint("regex", "[abc]+"), b"b", **options), row(constraint("regex", "[abc]+"), top_p=0.1, seed=1)]
    table = torch.stack([logits(z=30, b=9, c=8), logits(z=30, b=9)])
    assert [drawn.token_id for drawn in sample(table, rows)] == [ord("c"), ord("b")]


def test_log_probabilities_stay_those_of_the_model() -> None:
    masked, plain = row(constraint("regex", "a"), logprobs=1), row(None, logprobs=1)
    table = torch.stack([logits(z=9, a=5)] * 2)
    drawn, free = sample(table, [masked, plain])
    assert drawn.token_id == ord("a")
    assert drawn.logprobs is not None and free.logprobs is not None
    assert drawn.logprobs.top == free.logprobs.top
    assert drawn.logprobs.logprob == pytest.approx(table.log_softmax(-1)[0, ord("a")].item())


def test_min_tokens_and_ignore_eos_put_an_end_off_and_force_nothing_invalid() -> None:
    table = logits(end=9, z=8)[None]
    for options in ({"min_tokens": 10}, {"ignore_eos": True}, {"min_tokens": 10, "stop_token_ids": frozenset({98})}):
        assert sample(table, [row(constraint("regex", "b*|a*"), b"a", **options)])[0].token_id == ord("a")
        assert sample(table, [row(constraint("regex", "a"), b"a", **options)])[0].token_id == END
        assert sample(table, [row(constraint("regex", "a"), b"a", temperature=1, **options)])[0].token_id == END
    assert sample(table, [row(constraint("regex", "b*|a*"), b"a")])[0].token_id == END


def test_numbers_that_are_none_lead_to_a_refusal_and_to_no_invalid_token() -> None:
    of = constraint("regex", "[ab]")
    for table in (torch.full((1, VOCABULARY), torch.nan), torch.full((1, VOCABULARY), -torch.inf)):
        token = sample(table, [row(of)])[0].token_id
        assert (of.refusal([], token) is None) == (token in (ord("a"), ord("b")))


def test_masks_computed_ahead_are_those_that_are_asked_for() -> None:
    thread, rows = MaskThread("test"), [(constraint("regex", f"[{letter}x]+"), list(b"xx")) for letter in "abc"]
    thread.begin([*rows, (None, [])])
    table = mask(torch.zeros(4, VOCABULARY), [(index, of, output) for index, (of, output) in enumerate(rows)])
    for index, letter in enumerate(b"abc"):
        assert torch.nonzero(table[index] == 0)[:, 0].tolist() == sorted({letter, ord("x"), END})
    assert (table[3] == 0).all()
