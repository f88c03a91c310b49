"""Several answers to one prompt on real workers: each is what a request of its own gets, and the prompt is shared."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from killable import PROMPT, Cluster, cluster

from isthmus.cluster.client.client import Answer
from isthmus.proto.generation_pb2 import GenerateEvent

PAGE = 64
FULL = len(PROMPT) // PAGE
GREEDY = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": 60, "ignore_eos": True, "logit_bias": {7: 2.0}}


@dataclass
class Watched:
    """Answers, and what their decode workers held at most meanwhile."""

    cluster: Cluster
    pages: int = 0
    kills: list[asyncio.Task[None]] = field(default_factory=list)

    async def answers(self, sampling: dict[str, Any], codec: str, *, kill_at: int = 0) -> list[Answer]:
        tokens = 0

        def look(event: GenerateEvent) -> None:
            nonlocal tokens
            self.pages = max(self.pages, *(w.server.report().pages.in_use for w in self.cluster.decodes.values()))
            tokens += len(event.token_ids)
            if kill_at and tokens >= kill_at and not self.kills:
                self.kills.append(asyncio.create_task(self.cluster.kill_busy()))

        request = self.cluster.request(sampling, codec)
        answers = await self.cluster.client.answers(request, on_event=look, timeout_s=60)
        await asyncio.gather(*self.kills)
        assert bool(self.kills) == bool(kill_at)
        return answers


async def alone(
    running: Cluster, sampling: dict[str, Any], codec: str, number: int, tokens: int = len(PROMPT)
) -> Answer:
    own = {**sampling, "seed": sampling.get("seed", 0) + number}
    return await running.client.answer(running.request(own, codec, tokens=tokens), timeout_s=60)


PLACES = {  # codec, and who computes the prompt
    "raw, sent": ("raw", "never", {}),
    "raw, here": ("raw", "always", {}),
    "packed, sent": ("tq-k4v4", "never", {}),
    "packed, here": ("tq-k4v4", "always", {}),
    "packed pool, sent": ("tq-k4v4", "never", {"pool": "packed", "dtype": "bf16"}),
    "packed pool, here": ("tq-k4v4", "always", {"pool": "packed", "dtype": "bf16"}),
}


@pytest.mark.parametrize("place", PLACES)
async def test_each_answer_is_that_of_a_request_of_its_own(place: str) -> None:
    codec, local, decode = PLACES[place]
    async with cluster(local_prefill=local, decode=decode) as running:
        for sampling in (GREEDY, SEEDED):
            expected = [await alone(running, sampling, codec, number) for number in range(3)]
            answers = await Watched(running).answers({**sampling, "n": 3}, codec)
            assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
            assert [answer.text for answer in answers] == [answer.text for answer in expected]
            assert answers[0].usage.prompt_tokens == len(PROMPT)
            assert answers[0].usage.output_tokens == 180
            distinct = {tuple(answer.token_ids) for answer in answers}
            assert len(distinct) == (1 if sampling is GREEDY else 3)
            assert [answer.timings.transfer.held_tokens for answer in answers] == [0, len(PROMPT), len(PROMPT)]
        forked = [worker.server.report().counters["forked_prompts"] for worker in running.decodes.values()]
        assert sum(forked) == 4
        await running.idle()


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 128, 129, 192])
@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
async def test_prompts_of_any_length_are_shared_whole(codec: str, tokens: int) -> None:
    async with cluster(local_prefill="never") as running:
        sampling = {**SEEDED, "max_tokens": 8, "logprobs": 2}
        expected = [await alone(running, sampling, codec, number, tokens) for number in range(2)]
        request = running.request({**sampling, "n": 2}, codec, tokens=tokens)
        answers = await running.client.answers(request, timeout_s=60)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        assert [answer.timings.transfer.held_tokens for answer in answers] == [0, tokens]


@pytest.mark.parametrize("sharing", ["tenant", "none"])
async def test_the_prompt_is_computed_once_and_its_pages_are_shared(sharing: str) -> None:
    async with cluster(prefix_sharing=sharing, local_prefill="never") as running:
        watched = Watched(running)
        answers = await watched.answers({**SEEDED, "n": 4}, "raw")
        transfers = [answer.timings.transfer for answer in answers]
        assert [t.held_tokens for t in transfers] == [0, *[len(PROMPT)] * 3]
        assert len({answer.timings.decode_worker for answer in answers}) == 1
        counters = running.prefill.server.report().counters
        assert (counters["prompts"], counters["prompt_tokens"]) == (1, len(PROMPT))
        own = -(-(len(PROMPT) + 60) // PAGE) - FULL
        assert watched.pages == FULL + 4 * own
        await running.idle()


async def test_where_nothing_is_kept_the_prompt_is_sent_again() -> None:
    async with cluster(local_prefill="never", decode={"prefix_cache": 0}) as running:
        expected = [await alone(running, SEEDED, "raw", number) for number in range(3)]
        answers = await Watched(running).answers({**SEEDED, "n": 3}, "raw")
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        assert [answer.timings.transfer.held_tokens for answer in answers] == [0, 0, 0]


@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
async def test_a_killed_decode_worker_changes_no_answer(codec: str) -> None:
    async with cluster() as running:
        long = {**SEEDED, "max_tokens": 150}
        expected = [await alone(running, long, codec, number) for number in range(3)]
        for kill_at in (1, 60):
            answers = await Watched(running).answers({**long, "n": 3}, codec, kill_at=kill_at)
            assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        assert running.killed >= 2
        await running.idle()
