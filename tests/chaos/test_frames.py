"""Damaged, forged and replayed pages between real workers: refused, counted, and answered right all the same."""

import asyncio
import random

from faults.faulty_prefill import KINDS
from faults.frames import Rig, frame_rig, mutate_frames
from faults.tcp_proxy import bad_link
from harness import worker_pair
from models import model_path

from isthmus.proto.sampling import Sampling

ROUNDS = 4  # of every kind of corruption
GREEDY = Sampling(temperature=0, max_tokens=6, ignore_eos=True)


async def test_every_corruption_is_refused_and_counted_and_the_answer_is_right() -> None:
    async with frame_rig(model_path("tiny-llama")) as rig:
        count = ROUNDS * len(KINDS)
        result = await mutate_frames(rig, count)
        assert rig.faulty.corrupted == count
        assert (result["refused_frames"], result["answered"], result["wrong_tokens"]) == (count, count, 0)
        assert (result["wrong"], result["not_refused"]) == ({}, {})
        await settled(rig)


async def settled(rig: Rig) -> None:
    """Returns once no worker holds a page for a request."""
    async with asyncio.timeout(5):
        while any(worker.server.report().pages.in_use for worker in (rig.prefill, rig.decode)):
            await asyncio.sleep(0.02)


async def test_a_link_that_flips_bits_changes_no_token() -> None:
    """Whatever a flipped bit hits (HTTP/2, protobuf, header, page, token), it is never taken for good."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 500) for _ in range(300)] for _ in range(4)]
    settings = {"prefix_cache": 0}  # every answer has all its pages sent
    async with (
        worker_pair(model_path("tiny-llama"), decode=settings) as pair,
        bad_link(pair.prefill.address, seed=6) as link,
    ):
        right = [(await pair.generate(prompt, GREEDY, "tq-k4v4")).token_ids for prompt in prompts]
        for number in range(60):
            which = number % len(prompts)
            link.flip_every = 40_000
            request = pair.request(prompts[which], GREEDY, "tq-k4v4")
            request.prefill_addresses[:] = [link.address, pair.prefill.address]
            tokens: list[int] = []
            async for event in pair.call(request):
                tokens += event.token_ids
            assert tokens == right[which]
        assert link.flipped > 30
        assert pair.decode.server.report().counters["transfers_failed"] > 10
