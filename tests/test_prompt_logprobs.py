"""Log-probabilities of prompts through real workers: exact, each once, and of prompts whose pages are cached too."""

import asyncio

import pytest
import torch
from killable import PROMPT, cluster
from models import model_path
from receiving import prefill_worker
from transformers import AutoModelForCausalLM

from isthmus.cluster.client.client import Answer
from isthmus.kvtransfer.frame import MAX_SCORED_TOKENS
from isthmus.kvtransfer.receiver import KvReceiver
from isthmus.proto.errors import Corrupt
from isthmus.proto.generation_pb2 import GenerateEvent
from isthmus.proto.prefill_pb2 import PrefillEvent, PromptLogprobs
from isthmus.proto.sampling import Sampling

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}


def expected() -> torch.Tensor:
    """What transformers says: the log-probabilities [tokens - 1, vocabulary] at each place of PROMPT but the last."""
    net = AutoModelForCausalLM.from_pretrained(
        model_path("tiny-llama"), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.inference_mode():
        return net(torch.tensor([PROMPT]), use_cache=False).logits[0].log_softmax(-1)[:-1]


def check(answer: Answer, own: torch.Tensor, top: int) -> None:
    found = answer.prompt_logprobs
    assert len(found) == len(PROMPT) - 1
    wanted = own.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([token.logprob for token in found]), wanted, rtol=1e-4, atol=1e-3)
    assert {len(token.top) for token in found} == {top}
    best = [[each.token_id for each in token.top] for token in found]
    assert best == own.topk(top).indices.tolist() if top else True


@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
@pytest.mark.parametrize("local", ["never", "always"])
async def test_they_are_those_of_transformers_whatever_is_cached(codec: str, local: str) -> None:
    own = expected()
    async with cluster(local_prefill=local) as running:
        plain = await running.answer(GREEDY, codec, tenant="a")
        for top in (0, 3):
            events = list[GenerateEvent]()
            request = running.request({**GREEDY, "prompt_logprobs": top}, codec, "a")
            request.return_prompt_token_ids = True
            answer = await running.client.answer(request, on_event=events.append, timeout_s=60)
            check(answer, own, top)
            assert answer.prompt_token_ids == PROMPT
            assert answer.token_ids == plain.token_ids
            last_prompt = max(at for at, event in enumerate(events) if event.prompt_logprobs)
            assert last_prompt < min(at for at, event in enumerate(events) if event.token_ids)
            assert answer.timings.transfer.held_tokens == 0
        if codec == "raw":
            again = await running.answer(GREEDY, codec, tenant="a")  # what a scored prompt leaves is of use
            assert again.timings.transfer.held_tokens == 192
        await running.idle()


async def test_several_answers_tell_them_once() -> None:
    async with cluster(local_prefill="never") as running:
        request = running.request({**GREEDY, "prompt_logprobs": 1, "n": 3}, "raw")
        answers = await running.client.answers(request, timeout_s=60)
        check(answers[0], expected(), 1)
        assert [len(answer.prompt_logprobs) for answer in answers[1:]] == [0, 0]
        assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids


@pytest.mark.parametrize("at", ["first event", "output"])
async def test_a_killed_decode_worker_neither_loses_nor_repeats_any(at: str) -> None:
    async with cluster() as running:
        kills = list[asyncio.Task[None]]()

        def kill(event: GenerateEvent) -> None:
            if not kills and (event.prompt_logprobs if at == "first event" else event.index > 5):
                kills.append(asyncio.create_task(running.kill_busy()))

        request = running.request({**GREEDY, "prompt_logprobs": 2, "max_tokens": 150}, "raw")
        answer = await running.client.answer(request, on_event=kill, timeout_s=60)
        await asyncio.gather(*kills)
        check(answer, expected(), 2)
        assert len(answer.token_ids) == 150
        assert running.killed == 1


async def test_a_prefill_worker_sends_them_in_order_and_the_receiver_checks_each() -> None:
    prompt = [(7 * position + 3) % 500 for position in range(1000)]
    async with prefill_worker(model_path("tiny-llama")) as prefill:
        sampling = Sampling(temperature=0, max_tokens=1, prompt_logprobs=1)
        request = prefill.request(prompt)
        request.sampling.CopyFrom(sampling.to_pb())
        sent, whole = list[PromptLogprobs](), True
        event: PrefillEvent
        async for event in prefill.stub.Prefill(request):
            if event.HasField("prompt_logprobs"):
                assert whole, "all of them come ahead of the first token"
                sent.append(event.prompt_logprobs)
            whole = whole and not event.HasField("first_token")
        assert [part.first for part in sent] == [1 + sum(len(p.logprobs) for p in sent[:at]) for at in range(len(sent))]
        assert sum(len(part.logprobs) for part in sent) == len(prompt) - 1
        assert len(sent) > 1 and max(len(part.logprobs) for part in sent) <= MAX_SCORED_TOKENS

        def fresh(top: int | None = 1) -> KvReceiver:
            return prefill.receiver(request, prompt_logprobs=top)

        receiver = fresh()
        for part in sent:
            receiver.check_prompt_logprobs(part)
        with pytest.raises(Corrupt, match="token 1000 was due"):
            receiver.check_prompt_logprobs(sent[-1])
        with pytest.raises(Corrupt, match="token 1 was due"):
            fresh().check_prompt_logprobs(sent[1])
        with pytest.raises(Corrupt, match="not asked for"):
            fresh(None).check_prompt_logprobs(sent[0])
        with pytest.raises(Corrupt, match="more log-probabilities of a token came than the 0"):
            fresh(0).check_prompt_logprobs(sent[0])
        damaged = PromptLogprobs()
        damaged.CopyFrom(sent[0])
        damaged.logprobs[3].logprob += 0.5
        with pytest.raises(Corrupt, match="do not match their checksum"):
            fresh().check_prompt_logprobs(damaged)
