"""Requests and answers of the vLLM engine protocol, and what they are here: no gateway, no workers."""

from typing import Any

import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm

from isthmus.cluster.smg.request import translated
from isthmus.cluster.smg.response import Responses
from isthmus.proto.common_pb2 import (
    FINISH_REASON_EOS,
    FINISH_REASON_STOP,
    Choices,
    Grammar,
    TokenLogprobs,
    TopLogprob,
    TransferStats,
)
from isthmus.proto.generation_pb2 import GenerateEvent, Timings


async def sampling_of(**fields: Any) -> Any:
    asked = vllm.GenerateRequest(text="hi", sampling_params=vllm.SamplingParams(**fields))
    return (await translated(asked, 1000)).sampling


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"json_schema": "{}"}, Grammar(json_schema="{}")),
        ({"json_object": True}, Grammar(json_object=True)),
        ({"regex": "a+"}, Grammar(regex="a+")),
        ({"choice": vllm.ChoiceConstraint(choices=["a", "b"])}, Grammar(choices=Choices(texts=["a", "b"]))),
        ({"grammar": 'start: "a"'}, Grammar(lark='start: "a"')),
    ],
)
async def test_constraints_are_grammars(fields: dict[str, Any], grammar: Grammar) -> None:
    assert (await sampling_of(**fields)).grammar == grammar


async def test_ebnf_becomes_lark() -> None:
    lark = (await sampling_of(grammar='root ::= "yes" | "no"')).grammar.lark
    assert '"yes"' in lark
    assert "start:" in lark


async def test_what_is_not_set_stays_so() -> None:
    made = await sampling_of(json_object=False)
    assert {field.name for field, _ in made.ListFields()} == {"max_tokens"}
    assert made.max_tokens == 1000
    whole = await sampling_of(
        temperature=0, max_tokens=3, n=2, logit_bias={5: -1.5}, skip_special_tokens=True, logprobs=0
    )
    assert {field.name for field, _ in whole.ListFields()} == {
        *("temperature", "max_tokens", "n", "logit_bias", "logprobs")
    }
    assert (whole.n, dict(whole.logit_bias), whole.logprobs) == (2, {5: -1.5}, 0)


def responses(stream: bool, *events: GenerateEvent, **sampling: Any) -> list[vllm.GenerateResponse]:
    made = Responses(vllm.GenerateRequest(stream=stream, sampling_params=vllm.SamplingParams(**sampling)))
    made.prompt_token_ids = [1, 2, 3]
    return [*(response for event in events for response in made.of(event)), *made.completed()]


def test_each_of_n_answers_has_its_own_end() -> None:
    events = [
        GenerateEvent(choice=1, token_ids=[10]),
        GenerateEvent(choice=0, token_ids=[20]),
        GenerateEvent(request_id="a sign of life"),
        GenerateEvent(choice=1, token_ids=[11], finish_reason=FINISH_REASON_STOP, stop_text="x"),
        GenerateEvent(choice=0, token_ids=[7], finish_reason=FINISH_REASON_STOP),
    ]
    fields: dict[str, Any] = {"n": 2, "stop_token_ids": [7], "stop": ["x"]}
    first, second = (each.complete for each in responses(False, *events, **fields))
    assert (first.index, list(first.output_ids), first.matched_token_id) == (0, [20, 7], 7)
    assert (second.index, list(second.output_ids), second.matched_stop_str) == (1, [10, 11], "x")
    streamed = responses(True, *events, **fields)
    chunks = [(each.chunk.index, list(each.chunk.token_ids)) for each in streamed if each.HasField("chunk")]
    assert chunks == [(1, [10]), (0, [20]), (1, [11]), (0, [7])]
    ends = [(each.complete.index, list(each.complete.output_ids)) for each in streamed if each.HasField("complete")]
    assert ends == [(1, [11]), (0, [7])]  # with the last of the tokens, as vLLM's


def test_log_probabilities_of_the_prompt_come_with_the_first_chunk() -> None:
    known = [TokenLogprobs(logprob=-value, top=[TopLogprob(token_id=9, logprob=-0.1)]) for value in (2, 3)]
    transfer = TransferStats(held_tokens=1, cached_tokens=1, stored_tokens=0)
    events = [
        GenerateEvent(prompt_logprobs=known[:1]),
        GenerateEvent(prompt_logprobs=known[1:]),
        GenerateEvent(token_ids=[5]),
        GenerateEvent(token_ids=[6], finish_reason=FINISH_REASON_EOS, timings=Timings(transfer=transfer)),
    ]
    first, second, end = responses(True, *events, prompt_logprobs=1)
    got = first.chunk.input_logprobs
    assert list(got.token_ids) == [1, 2, 3]
    assert [each.value if each.HasField("value") else None for each in got.token_logprobs] == [None, -2, -3]
    assert [list(top.token_ids) for top in got.top_logprobs] == [[], [9], [9]]
    assert not second.chunk.HasField("input_logprobs")
    assert (end.complete.finish_reason, end.complete.cached_tokens) == ("stop", 2)
    assert end.complete.WhichOneof("matched_stop") is None
