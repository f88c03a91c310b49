"""A grammar of required calls lets through calls alone, and whatever it lets through is read as a valid call."""

import json
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import llguidance
import pytest
from chat_templates import CHATS
from models import model_path
from scripted import served

from isthmus.cluster.text.answer_parser import Delta, ToolChoice
from isthmus.cluster.text.answers import Answers
from isthmus.cluster.text.served import ServedModel
from isthmus.model.text.tokenizer import Detokenizer, Tokenizer
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.generation_pb2 import Chat, Tool

SCHEMAS: dict[str, Any] = {
    "get": {"type": "object", "properties": {"city": {"enum": ["Bern", "</tool_call>"]}}, "required": ["city"]},
    "get-all": {"type": "object", "properties": {"deep": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}},
    "get_none": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [Tool(name=name, parameters=json.dumps(schema)) for name, schema in SCHEMAS.items()]
TOOLS[2] = Tool(name="get_none")
END = '\n%llguidance {"no_forcing": true}\n'


class Vocabulary:
    """What llguidance asks for: the bytes of tokens as clients read them, special ones apart."""

    bos_token_id, eos_token_id = None, 2

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {token: name for name, token in tokenizer.special_tokens.items()}
        self.special_token_ids = list(names)
        self.tokens = [
            names[token].encode() if token in names else tokenizer.bytes_of(token)
            for token in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        return []


@cache
def model_and_theirs(name: str) -> tuple[ServedModel, Any, llguidance.LLTokenizer]:
    with TemporaryDirectory() as folder:
        CHATS[name].make(Path(folder))
        ours = Tokenizer(Path(folder))
    model = served(tokenizer=ours, answers=Answers(ours), vocab_size=ours.vocab_size)
    wrapped = llguidance.TokenizerWrapper(Vocabulary(ours))
    return model, ours, llguidance.LLTokenizer(wrapped, eos_token=[2])


def drawn(lark: str, tokenizer: llguidance.LLTokenizer, end: int, rng: random.Random) -> list[int]:
    """Tokens that the grammar allows, until it is complete."""
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(lark + END))
    assert not matcher.is_error(), matcher.get_error()
    tokens: list[int] = []
    for _ in range(2000):
        if matcher.is_stopped() or (matcher.is_accepting() and rng.random() < 0.3):
            return tokens
        mask = matcher.compute_bitmask()
        allowed = [t for t in range(tokenizer.vocab_size) if mask[t // 8] >> (t % 8) & 1 and t != end]
        tokens.append(rng.choice(allowed))
        assert matcher.consume_token(tokens[-1])
    raise AssertionError("no end")


def parsed(model: ServedModel, tokenizer: Tokenizer, tokens: list[int], choice: ToolChoice) -> list[Delta]:
    parser = model.new_answer_parser(Chat(tools=TOOLS), choice, tokenizer.encode("<think>\n"))
    decoder = Detokenizer(tokenizer)
    deltas = [delta for token in tokens for delta in parser.push(decoder.push([token]), [token])]
    return [*deltas, *parser.push(decoder.finish()), *parser.finish()]


def calls_in(deltas: list[Delta]) -> list[tuple[str, Any]]:
    assert all(not delta.content and not delta.reasoning for delta in deltas)
    found: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        assert delta.tool_index is not None
        name, arguments = found.get(delta.tool_index, ("", ""))
        found[delta.tool_index] = (name + delta.tool_name, arguments + delta.tool_arguments)
        assert bool(delta.tool_id) == bool(delta.tool_name)
    assert list(found) == list(range(len(found)))
    return [(name, json.loads(arguments)) for name, arguments in found.values()]


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("choice", [ToolChoice("required"), ToolChoice("required", "get-all")])
def test_whatever_the_grammar_allows_is_a_valid_call(name: str, choice: ToolChoice) -> None:
    model, tokenizer, theirs = model_and_theirs(name)
    grammar = model.tool_grammar(TOOLS, choice)
    assert grammar is not None
    counts = set()
    for seed in range(12):
        tokens = drawn(grammar.lark, theirs, 2, random.Random(seed))
        calls = calls_in(parsed(model, tokenizer, tokens, choice))
        assert calls
        counts.add(len(calls))
        for tool, arguments in calls:
            assert not choice.name or tool == choice.name
            jsonschema.validate(arguments, SCHEMAS[tool])
    assert max(counts) > 1 or choice.name or name in ("llama", "gpt-oss")
    assert max(counts) == 1 or not choice.name


@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_where_the_request_allows_them(parallel: bool) -> None:
    model, tokenizer, theirs = model_and_theirs("hermes")
    grammar = model.tool_grammar(TOOLS, ToolChoice("required"), parallel=parallel)
    assert grammar is not None
    matcher = llguidance.LLMatcher(theirs, llguidance.LLMatcher.grammar_from_lark(grammar.lark + END))
    call = '<tool_call>\n{"name": "get_none", "arguments": {}}\n</tool_call>'
    tokens = tokenizer.encode(call)
    assert matcher.consume_tokens(tokens)
    assert matcher.is_accepting()
    assert (matcher.validate_tokens(tokenizer.encode("\n" + call)) > 0) == parallel


def test_a_model_of_no_form_must_call_in_plain_text() -> None:
    model = served()
    grammar = model.tool_grammar(TOOLS, ToolChoice("required", "get"), parallel=False)
    assert grammar is not None and '<tool_call>\\n{\\"name\\": \\"get\\", \\"arguments\\": ' in grammar.lark
    text = '<tool_call>\n{"name": "get", "arguments": {"city": "Bern"}}\n</tool_call>'
    parser = model.new_answer_parser(Chat(tools=TOOLS), ToolChoice("required", "get"))
    assert calls_in([*parser.push(text), *parser.finish()]) == [("get", {"city": "Bern"})]
    assert parser.tool_calls == 1
    free = model.new_answer_parser(Chat(tools=TOOLS), ToolChoice())
    assert [*free.push(text), *free.finish()] == [Delta(content=text)]


def test_no_grammar_where_nothing_is_required() -> None:
    for choice in (ToolChoice(), ToolChoice("none")):
        assert served().tool_grammar(TOOLS, choice) is None


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([], ToolChoice("required"), "tool_choice requires a call, and the request has no tools"),
        (TOOLS, ToolChoice("required", "x"), "tool_choice names 'x'; allowed: get, get-all, get_none"),
        ([Tool(name="a b")], ToolChoice(), "a tool named 'a b'; allowed: 1 to 64 letters"),
        ([Tool(name="a" * 65)], ToolChoice(), "a tool named "),
        ([Tool(name="a"), Tool(name="a")], ToolChoice(), "two tools are named 'a'"),
        ([Tool(name=f"a{n}") for n in range(129)], ToolChoice(), "129 tools; allowed: at most 128"),
        ([Tool(name="a", parameters="{")], ToolChoice(), "the parameters of tool a is not JSON"),
        ([Tool(name="a", parameters="[]")], ToolChoice(), "allowed: a JSON object"),
        ([Tool(name="a", parameters='{"type": "string"}')], ToolChoice(), "allowed: a schema of an object"),
        ([Tool(name="a", parameters='{"a": NaN}')], ToolChoice(), "NaN is no number of JSON"),
        ([Tool(name="a", parameters='{"a":' + "[" * 99 + "]" * 99 + "}")], ToolChoice(), "nested too deep"),
        ([Tool(name="a", parameters='{"a":' + "[" * 99_999)], ToolChoice(), "(nested too deep|not JSON)"),
        ([Tool(name="a", parameters='{"a": ' + "1" * 9999 + "}")], ToolChoice(), "not JSON"),
    ],
)
def test_tools_that_are_not_valid_are_refused(tools: list[Tool], choice: ToolChoice, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        served().tool_grammar(tools, choice)


def test_the_prompt_tells_where_in_its_turn_an_answer_begins() -> None:
    model, tokenizer, _ = model_and_theirs("hermes")
    chat = Chat(tools=TOOLS)
    for prompt, first in (
        ("<|im_start|>assistant\n<think>\n", Delta(reasoning="Hm.")),
        ("<|im_start|>assistant\n<think>\nNo.\n</think>\n\n", Delta(content="Hm.")),
        ("<|im_start|>assistant\n" + "so " * 400 + "<think>", Delta(reasoning="Hm.")),
        ("<think>", Delta(content="Hm.")),
        ("", Delta(content="Hm.")),
    ):
        parser = model.new_answer_parser(chat, ToolChoice(), tokenizer.encode(prompt))
        assert parser.push("Hm.") == [first]


def test_a_model_without_tools_refuses_what_requires_a_call() -> None:
    tokenizer = Tokenizer(Path(model_path("smollm2-135m")))
    model = served(tokenizer=tokenizer, answers=Answers(tokenizer))
    with pytest.raises(InvalidRequest, match="the model's chat template has no tools"):
        model.tool_grammar(TOOLS, ToolChoice("required"))
    parser = model.new_answer_parser(Chat(), ToolChoice())
    assert parser.push("<think> x <tool_call> ") == [Delta(content="<think> x <tool_call> ")]
