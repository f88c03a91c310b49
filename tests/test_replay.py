"""Decode workers are killed in the middle of real answers: the client gets the tokens of the undisturbed run."""

from pathlib import Path

import pytest
from killable import PROMPT, cluster

from isthmus.cluster.client.client import Answer

GREEDY = {"temperature": 0, "max_tokens": 150, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": 150, "ignore_eos": True}


@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
async def test_a_killed_decode_worker_changes_no_token(codec: str) -> None:
    async with cluster() as running:
        for sampling in (GREEDY, SEEDED):
            whole = await running.answer(sampling, codec)
            assert (len(whole.token_ids), whole.timings.replays) == (150, 0)
            killed = await running.answer(sampling, codec, kill_at=(1, 70))
            assert (killed.token_ids, killed.text) == (whole.token_ids, whole.text)
            assert killed.timings.replays >= 1
        assert running.killed == 4
        await running.idle()


def reused(answer: Answer) -> list[int]:
    """Tokens of the prompt that were held by the decode worker, cached by the prefill worker, and in the store."""
    transfer = answer.timings.transfer
    return [transfer.held_tokens, transfer.cached_tokens, transfer.stored_tokens]


@pytest.mark.parametrize("codec", ["raw", "tq-k4v4"])
async def test_requests_that_share_nothing_find_no_page_of_another_and_their_own_when_replayed(
    codec: str, tmp_path: Path
) -> None:
    async with cluster(store=tmp_path, prefix_sharing="none", policy="round-robin", local_prefill="never") as running:
        first = await running.answer(GREEDY, codec, tenant="a")
        for _ in range(4):  # on both decode workers
            again = await running.answer(GREEDY, codec, tenant="a")
            assert reused(again) == reused(first) == [0, 0, 0]
            assert again.token_ids == first.token_ids
        counters = running.prefill.server.report().counters
        assert (counters["cached_tokens"], counters["stored_tokens"], counters["store_writes"]) == (0, 0, 0)
        assert counters["prompt_tokens"] == 5 * len(PROMPT)
        assert not list(tmp_path.rglob("*.*"))

        killed = await running.answer(GREEDY, codec, kill_at=(1, 70), tenant="a")
        assert killed.token_ids == first.token_ids
        assert killed.timings.replays >= 1
        counters = running.prefill.server.report().counters
        assert counters["cached_tokens"] >= 128, "a replay finds what was computed for itself"
        assert counters["prompt_tokens"] < 7 * len(PROMPT)
    async with cluster(store=tmp_path, local_prefill="never") as running:  # as it is by default
        await running.answer(GREEDY, codec, tenant="a")
        assert sum(reused(await running.answer(GREEDY, codec, tenant="a"))) >= 128
