"""Answers are told apart as the model's chat template writes them, whatever a model writes and however it is cut."""

import json
import time
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from chat_templates import CHATS, PLAIN, R1_DISTILL, Chat
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model.text.answers import forms
from isthmus.model.text.answers.form import AnswerForm
from isthmus.model.text.answers.markers import MarkedOutput
from isthmus.model.text.answers.reader import AnswerReader, Part
from isthmus.model.text.answers.recognition import answer_form, merged
from isthmus.model.text.conversation import Conversation
from isthmus.model.text.tokenizer import Detokenizer, Tokenizer
from isthmus.proto.errors import InvalidRequest

SINGLE = ("llama", "gpt-oss")  # that call one tool at a time
EXPECTED = {
    "hermes": forms.CHATML,
    "hermes-special": forms.CHATML,
    "qwen-xml": forms.QWEN_XML,
    "llama": forms.LLAMA,
    "mistral": forms.MISTRAL,
    "mistral-list": forms.MISTRAL_LIST,
    "gpt-oss": forms.HARMONY,
    "deepseek": forms.DEEPSEEK,
    "deepseek-fenced": forms.DEEPSEEK_FENCED,
    "gemma": forms.GEMMA,
}
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"city": "Zürich, 日本 🙂", "unit": 'a "quoted" \\ word'},
    {"n": 3, "deep": {"a": [1, 2.5, None, True, {"b": "}{]["}]}},
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "x",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "n": {"type": "integer"}, "deep": {"type": "object"}},
            },
        },
    }
    for name in ("get_weather", "look-up")
]
USER = {"role": "user", "content": "How is it?"}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": name, "arguments": arguments}}


def asked(parts: list[Part]) -> list[tuple[str, Any]]:
    """What a client sees, with arguments as values."""
    return [(part.kind, json.loads(part.text) if part.kind == "arguments" else part.text) for part in merged(parts)]


@cache
def tokenizer(name: str) -> Tokenizer:
    chat = {**CHATS, "r1": Chat(R1_DISTILL, (), ("<think>", "</think>")), "plain": Chat(PLAIN)}[name]
    with TemporaryDirectory() as folder:
        chat.make(Path(folder))
        return Tokenizer(Path(folder))


@cache
def form_of(name: str) -> AnswerForm:
    found = answer_form(tokenizer(name))
    assert found is not None
    return found


def cut(text: str, places: list[int]) -> Iterator[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    for start, end in pairwise(edges):
        yield text[start:end]


def read(form: AnswerForm, pieces: Any, *, calls: bool = True, prefix: str = "") -> list[Part]:
    reader = AnswerReader(form, prefix=prefix, calls=calls, tools=TOOLS)
    return [*(part for piece in pieces for part in reader.push(piece)), *reader.finish()]


def test_three_of_the_forms_are_those_of_transformers() -> None:
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS as THEIRS

    theirs = json.loads(json.dumps(list(THEIRS.values())).replace(r"(?P<name>\\w+)", r"(?P<name>[\\w-]+)"))
    assert theirs == [forms.CHATML, forms.QWEN_XML, forms.GEMMA]


@pytest.mark.parametrize("name", CHATS)
def test_a_form_is_found_by_what_the_chat_template_writes(name: str) -> None:
    found = form_of(name)
    fields = EXPECTED[name]["fields"]
    assert found.template(True).fields.keys() == fields.keys()
    pattern: Any = found.template(True).fields["tool_calls"].open_re
    assert pattern._pattern.pattern == fields["tool_calls"].get("open_pattern")
    assert (found.syntax is None) == (name in ("qwen-xml", "gemma"))  # arguments that are no JSON


def test_models_without_tools_have_a_form_if_they_think() -> None:
    assert answer_form(tokenizer("plain")) is None
    found = form_of("r1")
    assert not found.tools
    prompt = tokenizer("r1").chat_template(False)[0].render(Conversation(messages=[USER]))
    prefix = found.prefix(prompt)
    assert prefix == "<think>\n"
    parts = read(found, ["Hm. \n", "\n</thi", "nk>\n\nIt is", " so.\n"], calls=False, prefix=prefix)
    assert merged(parts) == [Part("reasoning", "Hm."), Part("content", "It is so.\n")]


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("several", [False, True])
def test_what_a_template_writes_for_calls_is_read_as_these_calls(name: str, several: bool) -> None:
    """The output that a model was trained to give, as tokens; and the conversation goes on with what was read."""
    if several and name in SINGLE:
        pytest.skip("one call at a time")
    text = tokenizer(name)
    calls = [call("get_weather", ARGUMENTS[0]), call("look-up", ARGUMENTS[1])][: 1 + several]
    template = text.chat_template(True)[0]
    said = Conversation(
        messages=[USER, {"role": "assistant", "content": "", "tool_calls": calls}],
        tools=TOOLS,
        add_generation_prompt=False,
    )
    form = form_of(name)
    output = form.prefix(template.render(said)) or ""
    ids = text.encode(output)
    marked = MarkedOutput(text, form.markers)
    decoder = Detokenizer(text)
    parts = read(form, [marked.push(decoder.push([token]), [token]) for token in ids])
    expected = [
        item
        for made in calls
        for item in (("call", made["function"]["name"]), ("arguments", made["function"]["arguments"]))
    ]
    found = asked(parts)
    assert found[: len(expected)] == expected
    assert all(kind == "content" and len(text) < 20 for kind, text in found[len(expected) :])  # the end of the turn
    answered = [
        {"role": "tool", "content": "sunny", "tool_call_id": made["id"], "name": made["function"]["name"]}
        for made in calls
    ]
    again = Conversation(
        messages=[*said.messages, *answered, {"role": "assistant", "content": "Sunny."}, USER], tools=TOOLS
    )
    assert "sunny" in template.render(again)


OUTPUTS = {
    "hermes": '<think>\nLet me see: <tool_call>\n\n</think>\n\nI ask. \n\n<tool_call>\n{"name": "get_weather", '
    '"arguments": {"city": "</tool_call> \\" x"}}\n</tool_call>\n<tool_call>\n{"arguments": {"n": 1}, '
    '"name": "look-up"}\n</tool_call>\n'
    ' and <tool_call>\nno JSON\n</tool_call>  \n<tool_call>{"name": "get_weather", "arguments": {"ci',
    "llama": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "x"}}<|eom_id|>  more',
    "mistral": 'I look.[TOOL_CALLS]look-up[ARGS]{"n": 1}[TOOL_CALLS] get_weather{"city": "[TOOL_CALLS]"}</s>',
    "mistral-list": 'x [TOOL_CALLS] [{"name": "look-up", "arguments": {"n": 2}}, '
    '{"name": "get_weather", "arguments": {}}]',
    "gpt-oss": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
    '<|end|><|start|>assistant<|channel|>commentary to=functions.look-up <|constrain|>json<|message|>{"n": 1}<|call|>',
    "deepseek": forms.deepseek(
        'Hm</think>\n\nyes<|tool▁calls▁begin|><|tool▁call▁begin|>look-up<|tool▁sep|>{"n": 1}<|tool▁call▁end|>\n'
        '<|tool▁call▁begin|>get_weather<|tool▁sep|>{"city": "```"}<|tool▁call▁end|><|tool▁calls▁end|>'
    ),
    "deepseek-fenced": forms.deepseek(
        "<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>get_weather\n```json\n"
        '{"city": "```"}\n```<|tool▁call▁end|><|tool▁calls▁end|>'
    ),
    "gemma": '<|channel>thought\nHm.\n<channel|>x<|tool_call>call:look-up{n:1,deep:{a:<|"|>}<|"|>}}<tool_call|>'
    '<|tool_call>call:get_weather{city:<|"|>Bern<|"|>}<tool_call|>',
    "qwen-xml": "ok\n\n<tool_call>\n<function=look-up>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>",
}
KINDS = {
    "hermes": ["reasoning", "content", "call", "arguments", "call", "arguments", "content", "call", "arguments"],
    "llama": ["call", "arguments", "content"],
    "mistral": ["content", "call", "arguments", "call", "arguments"],
    "mistral-list": ["content", "call", "arguments", "call", "arguments"],
    "gpt-oss": ["reasoning", "content", "call", "arguments"],
    "deepseek": ["reasoning", "content", "call", "arguments", "call", "arguments"],
    "deepseek-fenced": ["call", "arguments"],
    "gemma": ["reasoning", "content", "call", "arguments", "call", "arguments"],
    "qwen-xml": ["content", "call", "arguments"],
}


@pytest.mark.parametrize("name", OUTPUTS)
@settings(deadline=None, max_examples=60)
@given(places=st.lists(st.integers(0, 1 << 16), max_size=12))
def test_any_split_of_an_output_gives_the_same(name: str, places: list[int]) -> None:
    prefix = "<think>" if name == "deepseek" else ""
    form, text = form_of(name), OUTPUTS[name]
    whole = merged(read(form, [text], prefix=prefix))
    assert [part.kind for part in whole] == KINDS[name]
    assert merged(read(form, cut(text, places), prefix=prefix)) == whole
    assert merged(read(form, text, prefix=prefix)) == whole  # a character at a time


def test_calls_are_passed_on_while_they_are_written() -> None:
    reader = AnswerReader(form_of("hermes"), prefix="", calls=True)
    output = '<tool_call>\n{"name": "look-up", "arguments": {"deep": {"a": "b, c"}}}\n</tool_call>'
    found = [[*reader.push(piece)] for piece in (output[:45], output[45:52], output[52:60], output[60:])]
    assert found == [
        [],
        [Part("call", "look-up"), Part("arguments", '{"deep"')],
        [Part("arguments", ': {"a": ')],
        [Part("arguments", '"b, c"}}')],
    ]
    assert [*reader.finish()] == []


def test_what_is_no_call_is_content() -> None:
    form = form_of("hermes")
    for text in (
        "<tool_call>\n{'name': 'x'}\n</tool_call>",
        '<tool_call>{"name": "a b", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "x", "arguments": [1]}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call> \n x',
        "so <tool_call>",
        ' <tool_call>{"name": ',
        "[" * 100_000,
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        "a" + " " * 20_000 + "b",
    ):
        assert merged(read(form, [text])) == [Part("content", text)]
    output = '<tool_call>\n{"name": "look-up", "arguments": {}}\n</tool_call>'
    assert merged(read(form, [output], calls=False)) == [Part("content", output)]  # no tools, no calls


NOISE = st.lists(
    st.one_of(
        st.sampled_from(
            ["<tool", "</tool_call", "<|channel|>", "{", "}", '"', "\\", "\n", " ", "[TOOL", "<thin", "\t"]
        ),
        st.text(max_size=5),
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("name", CHATS)
@settings(deadline=None, max_examples=80)
@given(text=NOISE, places=st.lists(st.integers(0, 1 << 16), max_size=5))
def test_no_character_is_lost_where_there_is_no_call(name: str, text: str, places: list[int]) -> None:
    parts = merged(read(form_of(name), cut(text, places)))
    if all(part.kind == "content" for part in parts):
        assert "".join(part.text for part in parts) == text
    else:  # a whole marker was drawn
        assert any(sign in text for sign in ("<think>", "<tool_call>", "<|channel|>", "[TOOL_CALLS]"))


@pytest.mark.parametrize("name", CHATS)
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_damaged_outputs_never_raise(name: str, data: st.DataObject) -> None:
    pieces = [text for key, text in OUTPUTS.items() if key == name] or list(OUTPUTS.values())
    text = data.draw(st.sampled_from(pieces)) * 2
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(text)))
        text = text[:start] + data.draw(NOISE) + text[start + data.draw(st.integers(0, 9)) :]
    parts = read(form_of(name), [text])
    assert all(part.text for part in parts)
    assert merged(parts) == merged(read(form_of(name), cut(text, [7, 13, 50])))


def test_hostile_response_templates_take_no_time() -> None:
    """Patterns of a model's own that take exponential time: what follows is content."""
    spec = {
        "start_anchor": "<a>",
        "fields": {
            "tool_calls": {"open_pattern": r"(?:x+x+)+y", "close": "</c>", "content": "json", "repeats": True},
            "content": {"content": "text"},
        },
    }
    form = AnswerForm(spec, {})
    began = time.thread_time()
    assert merged(read(form, ["x" * 4000, "z", "more"])) == [Part("content", "x" * 4000 + "zmore")]
    assert time.thread_time() - began < 3
    tags = {"tag_pattern": r"<p=(?P<key>(?:a+)+)>(?P<value>.*?)</p>"}
    spec["fields"]["tool_calls"] = {"open": "<c>", "close": "</c>", "content": "xml-inline", "content_args": tags}
    text = "<c><p=" + "a" * 5000 + "</c>"
    began = time.thread_time()
    assert merged(read(AnswerForm(spec, {}), [text])) == [Part("content", text)]
    assert time.thread_time() - began < 3


@pytest.mark.parametrize(
    "spec",
    [
        {"fields": {}},
        {"fields": {"content": {}}},
        {"start_anchor": "x", "fields": {"content": {"open_pattern": "("}}},
        {"start_anchor": "x", "fields": {"content": {"open_pattern": "x" * 2000}}},
        {"start_anchor": "x", "version": 2, "fields": {"content": {}}},
        {"start_anchor": 3, "fields": {"content": {}}},
        ["x"],
    ],
)
def test_response_templates_that_are_not_valid_are_refused(spec: Any) -> None:
    with pytest.raises(InvalidRequest, match="the model's response template"):
        AnswerForm(spec, {})


def test_markers_stand_where_their_tokens_were() -> None:
    text = tokenizer("hermes-special")
    form = form_of("hermes-special")
    opened = next(token for token, name in form.markers.items() if name == "<tool_call>")
    marked = MarkedOutput(text, form.markers)
    assert marked.push("", text.encode("héy")) == ""  # held back by a stop string
    assert marked.push("hé", [opened, *text.encode("{")]) == "hé"
    assert marked.push("y{", []) == "y<tool_call>{"
    assert marked.push("", [opened]) == "<tool_call>"
    half = text.encode("é")
    assert marked.push("", [half[0]]) + marked.push("é", [half[1], opened]) == "é<tool_call>"
