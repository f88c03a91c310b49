"""Grammars of strangers are tried in a process apart, which gives up on what takes too much."""

import asyncio
import gc
import json
import subprocess
import time
from collections.abc import AsyncIterator

import pytest

from isthmus.cluster.text import grammar_trials
from isthmus.cluster.text.grammar_trials import GrammarTrials
from isthmus.proto.errors import Exhausted, InvalidRequest, Unavailable
from isthmus.proto.grammar import Grammar

TOO_MUCH = "it takes more than "
GOOD = Grammar(kind="json_object")


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(value))


@pytest.fixture
async def trials() -> AsyncIterator[GrammarTrials]:
    made = GrammarTrials({0: "<end>", 7: "<turn>"}, frozenset({0}))
    await made.check(GOOD)
    yield made
    made.close()


async def reason(trials: GrammarTrials, grammar: Grammar) -> str:
    with pytest.raises(InvalidRequest) as refused:
        await trials.check(grammar)
    return str(refused.value)


async def test_reasons_come_from_the_process(trials: GrammarTrials) -> None:
    await trials.check(schema({"type": "integer"}))
    await trials.check(Grammar(kind="choices", choices=("a", "é")))
    await trials.check(Grammar(kind="lark", text="start: <turn>"))
    assert await reason(trials, schema({"not": {}})) == (
        'grammar.json_schema cannot be compiled: Unimplemented keys: ["not"]'
    )
    assert await reason(trials, schema({"$ref": "#"})) == (
        "grammar.json_schema cannot be compiled: no output satisfies it"
    )
    assert "unclosed group" in await reason(trials, Grammar(kind="regex", text="("))


BOMBS = {
    "a machine of a million states": schema({"type": "integer", "multipleOf": 999_983}),
    "a product of machines": schema({"allOf": [{"multipleOf": 9_973, "type": "integer"}, {"multipleOf": 9_967}]}),
    "the same within Lark": Grammar(kind="lark", text='start: %json {"type": "integer", "multipleOf": 99999989}'),
    "many alternatives": Grammar(kind="lark", text="start: " + '"a"|' * 15_000 + '"b"'),
}
HARMLESS_OR_REFUSED = {
    "nesting": Grammar(kind="json_schema", text='{"items":' * 4_000 + "{}" + "}" * 4_000),
    "counts": schema({"type": "string", "maxLength": 1_000_000_000}),
    "nested counts": Grammar(kind="regex", text="((a{1,1000}){1,1000}){1,1000}"),
    "nested groups": Grammar(kind="regex", text="(" * 5_000 + "a" + ")" * 5_000),
    "a long enum": schema({"enum": list(range(8_000))}),
    "alternatives of alternatives": schema({"allOf": [{"anyOf": [{"const": n} for n in range(30)]}] * 30}),
}


@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_bomb_is_refused_and_the_next_grammar_is_not(trials: GrammarTrials, bomb: str) -> None:
    began_s = time.process_time()
    assert TOO_MUCH in await reason(trials, BOMBS[bomb])
    assert time.process_time() - began_s < 0.1, "nothing of it is done here"
    await trials.check(schema({"type": "string"}))


@pytest.mark.parametrize("name", HARMLESS_OR_REFUSED)
async def test_what_looks_like_a_bomb_is_answered_too(trials: GrammarTrials, name: str) -> None:
    try:
        await trials.check(HARMLESS_OR_REFUSED[name])
    except InvalidRequest as error:
        assert "grammar." in str(error)
    await trials.check(schema({"type": "string"}))


async def test_an_answer_is_known_and_the_process_is_started_anew(
    trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = BOMBS["a machine of a million states"]
    first = await reason(trials, bomb)
    trials.close()
    monkeypatch.setattr(subprocess, "Popen", None)
    assert await reason(trials, bomb) == first
    monkeypatch.undo()
    await trials.check(schema({"type": "null"}))


async def test_a_process_that_was_killed_costs_one_answer_at_most(trials: GrammarTrials) -> None:
    process = trials._process
    assert process is not None
    process.kill()
    try:
        await trials.check(schema({"minimum": 1}))
    except Unavailable:
        await trials.check(schema({"minimum": 1}))
    assert trials._process is not process


async def test_too_many_wait(trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trials, "MAX_WAITING", 3)
    asked = await asyncio.gather(
        *(trials.check(schema({"const": number})) for number in range(8)), return_exceptions=True
    )
    assert sum(isinstance(answer, Exhausted) for answer in asked) == 5
    assert sum(answer is None for answer in asked) == 3


async def test_the_process_ends_with_its_gateway() -> None:
    made = GrammarTrials({}, frozenset({0}))
    await made.check(GOOD)
    process = made._process
    assert process is not None and process.poll() is None
    del made
    gc.collect()
    await asyncio.to_thread(process.wait, 10)
