"""Structured output through real workers: what is finished is what was asked for, also where workers die meanwhile."""

import asyncio
import json
from pathlib import Path

import grpc.aio
import jsonschema
import numpy as np
import pytest
from harness import Pair, worker_pair
from models import REAL_MODELS, model_path
from support.in_process import InProcess, in_process
from support.schemas import HARD_SCHEMAS, Schema, random_schemas

from isthmus.cluster.client.client import Answer, build_request
from isthmus.model.grammar import llg
from isthmus.model.grammar.constraint import Constraint
from isthmus.model.grammar.llg import compile_grammar, make_tokenizer
from isthmus.model.load.describe import describe_model
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.proto import common_pb2
from isthmus.proto.common_pb2 import FINISH_REASON_EOS, FINISH_REASON_LENGTH
from isthmus.proto.grammar import Grammar
from isthmus.proto.sampling import Sampling

PROMPT = [(13 * position + 5) % 250 + 3 for position in range(100)]
NESTED = {
    "type": "object",
    "properties": {
        "a": {"type": "array", "items": {"enum": ["é", "x", 12345]}, "minItems": 4, "maxItems": 6},
        "b": {"type": "string", "pattern": "^[a-f]{10,20}$"},
        "c": {"type": "integer", "minimum": 1000, "maximum": 10**15},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}


async def ask(running: InProcess, schema: Schema, seed: int, **sampling: object) -> Answer:
    options = {"grammar": common_pb2.Grammar(json_schema=json.dumps(schema)), "seed": seed, "max_tokens": 400}
    request = build_request(token_ids=PROMPT, sampling={**options, **sampling})
    return await running.client.answer(request, timeout_s=120)


def is_valid(schema: Schema, text: str) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


async def test_finished_answers_are_valid_while_decode_workers_are_killed() -> None:
    schemas = [*HARD_SCHEMAS.values(), *random_schemas(25, 7)]
    async with in_process(model_path("tiny-llama")) as running:
        waiting, answers = asyncio.Semaphore(8), list[Answer | None]([None] * len(schemas))

        async def one(number: int) -> None:
            async with waiting:
                answers[number] = await ask(running, schemas[number], number)
                if number % 20 == 10:
                    await running.kill_busy()

        await asyncio.gather(*map(one, range(len(schemas))))
        assert running.killed >= 1
    finished = 0
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer is not None
        if answer.finish_reason == FINISH_REASON_EOS:
            finished += 1
            assert is_valid(schema, answer.text), (schema, answer.text)
        else:
            assert answer.finish_reason == FINISH_REASON_LENGTH
    assert finished > len(schemas) * 0.8


@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
async def test_a_killed_decode_worker_changes_no_token_of_a_structured_answer(codec: str) -> None:
    async with in_process(model_path("tiny-llama"), local_prefill="never") as running:
        for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "ignore_eos": True, "min_tokens": 300}):
            request = build_request(
                token_ids=PROMPT,
                sampling={
                    "grammar": common_pb2.Grammar(json_schema=json.dumps(NESTED)),
                    "seed": 4,
                    "max_tokens": 400,
                    **sampling,
                },
                codec=codec,
            )
            request.tenant = f"whole-{sampling['temperature']}"
            whole = await running.client.answer(request, timeout_s=120)
            kills = list[asyncio.Task[None]]()
            request.tenant = f"killed-{sampling['temperature']}"

            def kill_once(event: object, kills: list[asyncio.Task[None]] = kills) -> None:
                if not kills:
                    kills.append(asyncio.create_task(running.kill_busy()))

            killed = await running.client.answer(request, on_event=kill_once, timeout_s=120)
            await asyncio.gather(*kills)
            assert (killed.token_ids, killed.text) == (whole.token_ids, whole.text)
            assert killed.timings.replays >= 1
            if whole.finish_reason == FINISH_REASON_EOS:
                assert is_valid(NESTED, whole.text)


async def resumed(pair: Pair, sampling: Sampling, emitted: list[int], *, local: bool) -> list[int]:
    request = pair.request(PROMPT, sampling)
    request.emitted_token_ids.extend(emitted)
    if local:
        del request.prefill_addresses[:]
    return [token async for event in pair.call(request) for token in event.token_ids]


async def test_an_answer_goes_on_the_same_wherever_it_was_cut() -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        for kind, text in (("regex", "([a-f]é|[0-9]{2})+!"), ("json_schema", json.dumps(NESTED))):
            sampling = Sampling(grammar=Grammar(kind=kind, text=text), seed=3, max_tokens=60)  # pyright: ignore
            whole = (await pair.generate(PROMPT, sampling)).token_ids
            assert len(whole) > 5
            for local in (False, True):
                cuts = range(0 if local else 1, len(whole), 3)
                rest = await asyncio.gather(*(resumed(pair, sampling, whole[:cut], local=local) for cut in cuts))
                assert rest == [whole[cut:] for cut in cuts]


async def test_grammars_that_cannot_be_compiled_end_their_own_request_at_the_gateway_and_at_workers() -> None:
    path = model_path("tiny-llama")
    wrong = Sampling(grammar=Grammar(kind="json_schema", text='{"not": {}}'), max_tokens=5)
    good = Sampling(grammar=Grammar(kind="choices", choices=("yes", "no")), max_tokens=20, seed=1)
    async with worker_pair(path) as pair:
        for local in (False, True):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await resumed(pair, wrong, [], local=local)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert 'Unimplemented keys: ["not"]' in (refused.value.details() or "")
        answer = await pair.generate(PROMPT, good)
        assert Tokenizer(Path(path)).decode(answer.token_ids) in ("yes", "no")
        assert answer.finish == FINISH_REASON_EOS
    async with in_process(path, decodes=1) as running:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(running, {"type": "array", "uniqueItems": True}, 1)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details() == 'grammar.json_schema cannot be compiled: Unimplemented keys: ["uniqueItems"]'
        answer = await ask(running, {"const": "<eos>"}, 1)
        assert (answer.text, answer.finish) == ('"<eos>"', "eos")


async def test_a_grammar_that_becomes_too_complex_ends_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each letter may be the one that counts, so that the machine gets a state for each way there was."""
    monkeypatch.setattr(llg, "MAX_LEXER_STATES", 200)
    bomb = Sampling(grammar=Grammar(kind="regex", text="([ab]*a[ab]{30}b)+"), max_tokens=900, ignore_eos=True, seed=1)
    good = Sampling(grammar=Grammar(kind="regex", text="[a-z]{100}"), max_tokens=200, seed=1)
    async with worker_pair(model_path("tiny-llama")) as pair:
        alone = await pair.generate(PROMPT, good)
        beside, ended = await asyncio.gather(
            pair.generate(PROMPT, good), pair.generate(PROMPT, bomb), return_exceptions=True
        )
        assert not isinstance(beside, BaseException)
        assert (beside.token_ids, beside.finish) == (alone.token_ids, FINISH_REASON_EOS)
        assert isinstance(ended, grpc.aio.AioRpcError)
        assert ended.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the output cannot go on within the grammar" in (ended.details() or "")


@pytest.mark.parametrize("name", REAL_MODELS)
def test_the_tokens_of_real_tokenizers(name: str) -> None:
    """Byte-level and SentencePiece: what is matched is what the client reads, and special tokens are no text."""
    about = describe_model(name)
    text = Tokenizer(about.path)
    more = about.vocab_size + 64  # a model may have more than its tokenizer
    tokenizer = make_tokenizer(text.vocabulary(), text.special_tokens, about.eos_token_ids, more)

    def allowed(of: Constraint, output: list[int]) -> list[int]:
        bits = of.allowed(output)
        assert bits is not None
        return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()

    spelled = text.special_tokens[max(about.eos_token_ids)]
    wanted = ("The sea is é😀\n\n  deep", spelled)
    for chosen in wanted:
        matcher = compile_grammar(tokenizer, Grammar(kind="choices", choices=wanted))
        of, output = Constraint(matcher, more, lambda: None), list[int]()
        while not set(tokens := allowed(of, output)) & about.eos_token_ids:
            so_far = b"".join(map(text.bytes_of, output))
            rest = chosen.encode()[len(so_far) :]
            fitting = [token for token in tokens if rest.startswith(text.bytes_of(token))]
            assert not set(tokens) & text.special_tokens.keys()
            output.append(max(fitting, key=lambda token: len(text.bytes_of(token))))
        assert set(tokens) <= about.eos_token_ids
        assert text.decode(output) == chosen
    anything = Constraint(compile_grammar(tokenizer, Grammar(kind="regex", text="(?s:.)*")), more, lambda: None)
    tokens = set(allowed(anything, []))
    assert tokens & text.special_tokens.keys() == about.eos_token_ids & tokens
    assert max(tokens) < text.vocab_size
    assert len(tokens) > 0.9 * (text.vocab_size - len(text.special_tokens))
