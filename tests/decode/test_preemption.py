"""A pool that is too small for what runs: nobody waits for ever, and nobody's tokens change."""

import asyncio
import os
import random

import pytest
from harness import Answer, Pair, worker_pair
from models import model_path

from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from isthmus.proto.sampling import Sampling

POOLS = [("raw", "dense"), ("tq-k4v4", "dense"), ("tq-k4v4", "packed")]


def pair_of(codec: str, pool: str, **decode: float):
    own = {"default_codec": codec}
    return worker_pair(model_path("tiny-llama"), prefill=own, decode=own | {"pool": pool, "prefix_cache": 0} | decode)


def tokens(count: int, salt: int) -> list[int]:
    return [(17 * position + salt) % 500 for position in range(count)]


@pytest.mark.parametrize(("codec", "pool"), POOLS)
async def test_preempted_requests_come_back_and_go_on_as_if_nothing_had_been(codec: str, pool: str) -> None:
    sampling = Sampling(temperature=0.7, seed=4, max_tokens=150, ignore_eos=True)
    async with pair_of(codec, pool, pool_tokens=640, headroom_tokens=8) as pair:
        prompts = [tokens(130, salt) for salt in range(4)]
        alone = [(await pair.generate(prompt, sampling, codec)).token_ids for prompt in prompts]
        assert not pair.decode.server.report().counters["preemptions"]
        together = await asyncio.gather(*(pair.generate(prompt, sampling, codec) for prompt in prompts))
        counters = pair.decode.server.report().counters
        assert counters["preemptions"] >= 1 and counters["preemptions"] == counters["resumed"]
        assert counters["preempted_bytes"] > 0
        differ = sum(answer.token_ids != token_ids for answer, token_ids in zip(together, alone, strict=True))
        assert differ <= (codec != "raw"), "at most a near tie may turn where a batch rounds otherwise, codes with it"


async def test_an_urgent_request_takes_the_place_of_a_batch_job() -> None:
    long = Sampling(temperature=0, max_tokens=300, ignore_eos=True)
    short = Sampling(temperature=0, max_tokens=5, ignore_eos=True)
    async with pair_of("raw", "dense", max_batch=2) as pair:

        async def ask(prompt: list[int], sampling: Sampling, priority: int) -> Answer:
            request = pair.request(prompt, sampling)
            request.priority = priority  # type: ignore[assignment]
            answer = Answer()
            async for event in pair.call(request):
                answer.token_ids += event.token_ids
            return answer

        alone = (await ask(tokens(100, 1), long, PRIORITY_BATCH)).token_ids
        jobs = [asyncio.create_task(ask(tokens(100, salt), long, PRIORITY_BATCH)) for salt in (1, 2, 3)]
        while pair.decode.server.report().counters["output_tokens"] < 320:
            await asyncio.sleep(0.005)
        assert len((await ask(tokens(50, 9), short, PRIORITY_INTERACTIVE)).token_ids) == 5
        assert not any(job.done() for job in jobs), "it waited for none of them"
        assert pair.decode.server.report().counters["preemptions"] == 1
        assert [len(answer.token_ids) for answer in await asyncio.gather(*jobs)] == [300] * 3
        assert jobs[0].result().token_ids == alone


async def test_with_no_host_memory_requests_get_all_their_pages_at_once() -> None:
    sampling = Sampling(temperature=0, max_tokens=100, ignore_eos=True)
    async with pair_of("raw", "dense", pool_tokens=512, preempt_gib=0) as pair:
        answers = await asyncio.gather(*(pair.generate(tokens(150, salt), sampling) for salt in range(4)))
        assert [len(answer.token_ids) for answer in answers] == [100] * 4
        assert not pair.decode.server.report().counters["preemptions"]


async def test_random_requests_leak_nothing_and_each_gets_what_it_gets_alone() -> None:
    """RANDOM_REQUESTS=1000 in the environment runs as many as the goal asks for."""
    rng, requests = random.Random(5), int(os.environ.get("RANDOM_REQUESTS", "200"))
    pool = {"pool_tokens": 30 * 8, "max_batch": 12, "headroom_tokens": 8, "preempt_gib": 4e-4, "prefix_cache": 0.5}
    small = {"page_tokens": 8, "default_codec": "raw"}
    async with worker_pair(
        model_path("tiny-llama"), prefill=small | {"chunk_tokens": 64}, decode=small | pool | {"chunk_tokens": 16}
    ) as pair:
        kinds = [make_kind(rng) for _ in range(30)]
        alone = [(await pair.generate(prompt, sampling)).token_ids for prompt, sampling in kinds]
        gate, done = asyncio.Semaphore(32), [0, 0]

        async def one(number: int) -> None:
            async with gate:
                kind = number % len(kinds)
                cancel_after = rng.randrange(30) if rng.random() < 0.15 else None
                got = await play(pair, *kinds[kind], rng, cancel_after)
                assert got == alone[kind][: len(got)], "a wrong token"
                assert len(got) == len(alone[kind]) or (cancel_after is not None and len(got) <= cancel_after + 1)
                done[len(got) < len(alone[kind])] += 1

        await asyncio.gather(*(one(number) for number in range(requests)))
        counters = pair.decode.server.report().counters
        assert done[0] > 0.8 * requests and done[1] > 0.05 * requests
        assert counters["preemptions"] and counters["local_prompts"] and counters["prefix_hit_tokens"]
        await pair.baseline()
        pages = pair.decode.server.report().pages
        assert pages.in_use == 0 and pages.free + pages.cached == pages.total == 30


def make_kind(rng: random.Random) -> tuple[list[int], Sampling]:
    start = rng.randrange(3)  # few, so that prefixes are found
    prompt = [(13 * position + start) % 500 for position in range(rng.randint(1, 60))]
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        seed=rng.randrange(1000),
        top_k=rng.choice([0, 20]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.1]),
        presence_penalty=rng.choice([0.0, 0.0, 0.8]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
        max_tokens=rng.randint(1, 40),
        ignore_eos=rng.random() < 0.8,
    )
    return prompt, sampling


async def play(
    pair: Pair, prompt: list[int], sampling: Sampling, rng: random.Random, cancel_after: int | None
) -> list[int]:
    """One request of a random class, at times with no prefill worker; ends it early where told to."""
    request = pair.request(prompt, sampling)
    request.priority = rng.choice([PRIORITY_INTERACTIVE, PRIORITY_STANDARD, PRIORITY_BATCH])
    if rng.random() < 0.2:
        del request.prefill_addresses[:]
    call, got = pair.call(request), []
    async for event in call:
        got += event.token_ids
        if cancel_after is not None and len(got) > cancel_after:
            call.cancel()
            break
    return got
