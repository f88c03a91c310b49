"""Fields of a request that change what is drawn or where the output ends, through real workers."""

from collections.abc import Sequence

import pytest
import torch
from killable import PROMPT, cluster
from models import model_path
from transformers import AutoModelForCausalLM

from isthmus.proto.common_pb2 import FINISH_REASON_EOS, FINISH_REASON_LENGTH, FINISH_REASON_STOP

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


def logits_of(output: Sequence[int]) -> torch.Tensor:
    """What transformers says [tokens of the output, vocabulary] before each of them."""
    net = AutoModelForCausalLM.from_pretrained(
        model_path("tiny-llama"), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.no_grad():
        return net(torch.tensor([[*PROMPT, *output]]), use_cache=False).logits[0, len(PROMPT) - 1 : -1].clone()


@pytest.mark.parametrize("local", ["never", "always"])
async def test_each_field_does_what_it_says(local: str) -> None:
    async with cluster(local_prefill=local) as running:

        async def draw(**sampling: object) -> list[int]:
            return (await running.answer({**GREEDY, **sampling}, "raw")).token_ids

        plain = await draw()
        seeded = {"temperature": 0.9, "seed": 4}
        assert await draw(**seeded) == await draw(**seeded) != await draw(**(seeded | {"seed": 5}))
        assert await draw(**seeded, top_k=1) == await draw(**seeded, min_p=1) == plain
        assert await draw(logit_bias={77: 100.0}) == [77] * 12
        assert plain[0] not in await draw(logit_bias={plain[0]: -100.0})

        bias = {plain[0]: -3.0, 8: 1.5}
        penalised = await draw(repetition_penalty=1.7, logit_bias=bias)
        assert penalised != plain
        for place, logits in enumerate(logits_of(penalised)):
            seen = list({*PROMPT, *penalised[:place]})
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.7, logits[seen] * 1.7)
            for token, value in bias.items():
                logits[token] += value
            assert int(logits.argmax()) == penalised[place]


@pytest.mark.parametrize("local", ["never", "always"])
async def test_where_an_output_ends(local: str) -> None:
    async with cluster(local_prefill=local) as running:
        eos = min(running.prefill.model.eos_token_ids)
        plain = await running.answer(GREEDY, "raw")
        last = next(at for at, token in enumerate(plain.token_ids) if at > 2 and token not in plain.token_ids[:at])
        stopped = await running.answer({**GREEDY, "stop_token_ids": [plain.token_ids[last]]}, "raw")
        assert (stopped.token_ids, stopped.finish_reason) == (plain.token_ids[: last + 1], FINISH_REASON_STOP)
        assert stopped.stop_text == ""

        first = plain.token_ids[0]
        later = await running.answer({**GREEDY, "stop_token_ids": [first], "min_tokens": 6}, "raw")
        assert len(later.token_ids) >= 6 and first not in later.token_ids[:6]

        ends = {**GREEDY, "logit_bias": {eos: 100.0}}
        ended = await running.answer({**ends, "ignore_eos": False}, "raw")
        assert (ended.token_ids, ended.finish_reason) == ([eos], FINISH_REASON_EOS)
        beyond = await running.answer(ends, "raw")
        assert (beyond.token_ids, beyond.finish_reason) == ([eos] * 12, FINISH_REASON_LENGTH)
