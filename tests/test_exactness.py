"""The cluster's greedy output is that of transformers' `generate`, token by token (codec raw, fp32)."""

import asyncio
import random
from typing import Any

import pytest
import torch
from harness import worker_pair
from models import REAL_MODELS, TINY_MODELS, model_path
from transformers import AutoModelForCausalLM

from isthmus.proto.sampling import Sampling

LENGTHS = (1, 2, 63, 64, 65, 200, 700)
NEW_TOKENS = dict.fromkeys(TINY_MODELS, 64) | dict.fromkeys(REAL_MODELS, 32)  # both cross borders of pages


def make_prompts(vocab_size: int) -> list[list[int]]:
    """One prompt of each length and a second one of 128 tokens, so that eight can run at once."""
    rng = random.Random(7)
    return [[rng.randrange(vocab_size) for _ in range(tokens)] for tokens in (*LENGTHS, 128)]


def reference(path: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What transformers makes of each prompt, alone."""
    net: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    outputs = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = net.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                repetition_penalty=1.0,
            )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("name", [*TINY_MODELS, *REAL_MODELS])
async def test_greedy_output_is_that_of_transformers(name: str) -> None:
    path = model_path(name)
    greedy = Sampling(temperature=0, max_tokens=NEW_TOKENS[name], ignore_eos=True)
    async with worker_pair(path, prefill={"chunk_tokens": 256}) as pair:
        prompts = make_prompts(pair.decode.server.report().model.vocab_size)
        expected = reference(path, prompts, NEW_TOKENS[name])

        alone = [await pair.generate(prompt, greedy) for prompt in prompts]
        assert [answer.token_ids for answer in alone] == expected

        order = list(range(len(prompts)))
        random.Random(name).shuffle(order)

        async def arrive(index: int) -> list[int]:
            await asyncio.sleep(order.index(index) * 0.02)
            return (await pair.generate(prompts[index], greedy)).token_ids

        together = await asyncio.gather(*(arrive(index) for index in range(len(prompts))))
        assert together == expected

        # Packed pages change later tokens, but the first one comes from exact KV.
        first = Sampling(temperature=0, max_tokens=1, ignore_eos=True)
        packed = [await pair.generate(prompt, first, codec="tq-k4v4") for prompt in prompts]
        assert [answer.token_ids for answer in packed] == [tokens[:1] for tokens in expected]
