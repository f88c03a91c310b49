"""Prompts that a decode worker computes itself stay within their memory, and each is computed as if it were alone."""

import asyncio

import pytest
from harness import Answer, Pair, worker_pair
from models import model_path

from isthmus.proto.sampling import Sampling
from isthmus.worker.step_plan import SequencePages, SequencePlan

GREEDY = Sampling(temperature=0, max_tokens=4, ignore_eos=True)
LENGTHS = (600, 500, 450, 400, 300, 1000)


async def here(pair: Pair, prompt: list[int]) -> Answer:
    """The answer to a prompt that no prefill worker computes."""
    request = pair.request(prompt, GREEDY, "tq-k4v4")
    del request.prefill_addresses[:]
    answer = Answer()
    async for event in pair.call(request):
        answer.token_ids += event.token_ids
    return answer


@pytest.mark.parametrize("pool", ["dense", "packed"])
async def test_local_prompts_take_their_budget_at_most(pool: str) -> None:
    own = {"default_codec": "tq-k4v4"}
    decode = own | {"pool": pool, "pool_tokens": 8192, "prefix_cache": 0, "chunk_tokens": 64, "max_batch": 8}
    async with worker_pair(model_path("tiny-llama"), prefill=own, decode=decode) as pair:
        engine, taken = pair.decode._engine, list[int]()
        open_prompt = engine._runner.open_prompt

        def watched(plan: SequencePlan, pages: SequencePages) -> None:
            open_prompt(plan, pages)
            taken.append(engine.local_bytes)

        engine._runner.open_prompt = watched
        prompts = [[(7 * position + length) % 500 for position in range(length)] for length in LENGTHS]
        alone = [(await here(pair, prompt)).token_ids for prompt in prompts]
        one_token = pair.decode._memory.kv.local_token_bytes
        assert max(taken) == 1000 * one_token
        taken.clear()
        together = await asyncio.gather(*(here(pair, prompt) for prompt in prompts))
        assert [answer.token_ids for answer in together] == alone
        budget = pair.decode._memory.kv.local_bytes
        assert budget == 1024 * one_token, "the longest prompt that the model takes"
        assert 600 * one_token < max(taken) <= budget, "as many at once as fit"
        uses = {use.name: (use.used_bytes, use.budget_bytes) for use in pair.decode.server.report().memory}
        assert uses["local prompts"] == (0, budget)
        assert uses["KV pages"][0] == 0 < uses["KV pages"][1]
        await pair.baseline()
