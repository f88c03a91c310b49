"""Prompts that share beginnings, through a prefill and a decode worker: the same tokens as with nothing kept."""

import asyncio
import random
from pathlib import Path

import pytest
from harness import Pair, worker_pair
from models import model_path

from isthmus.proto.sampling import Sampling

GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)
NOTHING_KEPT = {"host_cache_gib": 0}


def make_prompt(tokens: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + position * 31) % 500 for position in range(tokens)]


@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
async def test_turns_of_a_chat_answer_as_without_reuse(codec: str) -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        conversation, turns = make_prompt(200), []
        for turn in range(4):
            answer = await pair.generate(conversation, GREEDY, codec)
            turns.append((list(conversation), answer.token_ids))
            saved = answer.transfer.held_tokens + answer.transfer.cached_tokens
            before = len(turns[-2][0]) if turn else 0
            assert saved >= before // 64 * 64
            conversation += answer.token_ids + make_prompt(100, seed=turn + 2)
    # A codec that packs loses a little of what a page was computed from, and a page that filled while decoding
    # was computed from other such pages than a prompt's: tokens are the same with `raw` only.
    for prompt, tokens in turns if codec == "raw" else ():
        async with worker_pair(model_path("tiny-llama")) as fresh:
            assert (await fresh.generate(prompt, GREEDY, codec)).token_ids == tokens


@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
async def test_a_replayed_request_is_a_transfer_and_goes_on_with_the_same_tokens(codec: str) -> None:
    """As after the death of its decode worker: the same prompt and what was emitted so far."""
    prompt = make_prompt(700)
    async with worker_pair(model_path("tiny-llama")) as pair:
        whole = await pair.generate(prompt, GREEDY, codec)
        before = pair.prefill.server.report().counters["prompt_tokens"]
        request = pair.request(prompt, GREEDY, codec)
        request.emitted_token_ids.extend(whole.token_ids[:10])
        rest = [token async for event in pair.call(request) for token in event.token_ids]
        assert rest == whole.token_ids[10:]
        assert pair.prefill.server.report().counters["prompt_tokens"] - before <= 60


async def test_random_prompts_with_shared_beginnings_and_random_cancels(tmp_path: Path) -> None:
    """In a pool, a host cache and a store that are all too small for what comes."""
    rng = random.Random(5)
    bases = [make_prompt(900, seed) for seed in range(3)]
    prompts = []
    for number in range(60):
        shared = rng.choice(bases)[: rng.randrange(1, 700)]
        prompts.append(shared + make_prompt(rng.randrange(1, 200), seed=100 + number))
    small = {
        "pool_tokens": 2048,
        "chunk_tokens": 128,
        "host_cache_gib": 1 / 1024,
        "store_dir": str(tmp_path),
        "store_gib": 1 / 512,
    }

    async with worker_pair(model_path("tiny-llama"), prefill=small) as pair:

        async def run(prompt: list[int]) -> list[int] | None:
            await asyncio.sleep(rng.random() * 4)
            if rng.random() < 0.7:
                return (await pair.generate(prompt, GREEDY)).token_ids
            call = pair.call(pair.request(prompt, GREEDY))
            await asyncio.sleep(rng.random() / 10)
            call.cancel()
            return None

        answers = await asyncio.gather(*(run(prompt) for prompt in prompts))
        counters = pair.prefill.server.report().counters
        assert counters["cached_tokens"] and counters["host_cache_evicted"] and counters["store_evicted"]
        assert not counters["store_corrupt"]
    async with worker_pair(model_path("tiny-llama"), prefill=NOTHING_KEPT) as fresh:
        for prompt, tokens in zip(prompts, answers, strict=True):
            if tokens is not None:
                assert await alone(fresh, prompt) == tokens


async def alone(pair: Pair, prompt: list[int]) -> list[int]:
    """The answer of a pair that keeps nothing: another tenant shares no pages."""
    request = pair.request(prompt, GREEDY)
    request.tenant = request.request_id
    return [token async for event in pair.call(request) for token in event.token_ids]
