"""Pages that a decode worker holds already are not sent: the same tokens as without, and fewer bytes."""

import asyncio

import pytest
from harness import Answer, Pair, worker_pair
from models import model_path

from isthmus.decode.pool.base import final_pages, reusable_tokens
from isthmus.decode.pool.dense import DenseKvPool
from isthmus.proto.sampling import Sampling

POOLS = [("raw", "dense"), ("tq-k4v4", "dense"), ("tq-k4v4", "packed")]
SHORT = Sampling(temperature=0, max_tokens=24, ignore_eos=True)


def pair_of(codec: str, pool: str, **decode: float):
    own = {"default_codec": codec}
    return worker_pair(model_path("tiny-llama"), prefill=own, decode=own | {"pool": pool} | decode)


def tokens(count: int, salt: int = 0) -> list[int]:
    return [(17 * position + salt) % 500 for position in range(count)]


async def ask(pair: Pair, prompt: list[int], codec: str, *, tenant: str = "", local: bool = False) -> Answer:
    request = pair.request(prompt, SHORT, codec)
    request.tenant = tenant
    if local:
        del request.prefill_addresses[:]
    answer = Answer()
    async for event in pair.call(request):
        answer.token_ids += event.token_ids
        if event.HasField("transfer"):
            answer.transfer = event.transfer
    return answer


def test_what_is_final_and_what_may_be_reused():
    assert [final_pages(stored, 64, True) for stored in (63, 64, 128, 191, 192, 256)] == [0, 1, 1, 1, 2, 3]
    assert [final_pages(stored, 64, False) for stored in (63, 64, 128)] == [0, 1, 2]
    assert [reusable_tokens(prompt, 64, True) for prompt in (64, 65, 128, 129, 192, 200)] == [0, 64, 64, 64, 128, 128]
    assert [reusable_tokens(prompt, 64, False) for prompt in (1, 64, 65, 128, 129)] == [0, 0, 64, 64, 128]


@pytest.mark.parametrize(("codec", "pool"), POOLS)
async def test_a_prompt_that_was_seen_is_not_sent_again(codec: str, pool: str) -> None:
    async with pair_of(codec, pool) as pair:
        for count in (64, 100, 128, 200):
            prompt = tokens(count)
            reusable = reusable_tokens(count, 64, codec != "raw")
            if count == 200 and pool == "dense":
                reusable = 192  # there is a raw copy of the last full page
            fresh = await ask(pair, prompt, codec, tenant=f"{count}")
            assert fresh.transfer.held_tokens == 0, "another tenant's pages are never found"
            again = await asyncio.gather(*(ask(pair, prompt, codec, tenant=f"{count}") for _ in range(2)))
            here = await ask(pair, prompt, codec, tenant=f"{count}", local=True)
            for answer in (*again, here):
                if answer is not here or codec == "raw":  # what is computed here attends to packed pages
                    assert answer.token_ids == fresh.token_ids
                assert answer.transfer.held_tokens == reusable
            assert here.transfer.local_tokens == count - reusable
            if reusable:
                assert again[0].transfer.kv_bytes_bf16 < fresh.transfer.kv_bytes_bf16
        report = pair.decode.server.report()
        assert report.counters["prefix_hit_tokens"] > 0 and report.pages.cached > 0


@pytest.mark.parametrize(("codec", "pool"), POOLS)
async def test_the_next_turn_of_a_conversation_finds_the_answer_too(codec: str, pool: str) -> None:
    async with pair_of(codec, pool) as pair:
        prompt = tokens(180)
        answer = await ask(pair, prompt, codec)
        turn = prompt + answer.token_ids + tokens(60, 3)  # 264 tokens: four pages, three of them stored by now
        found = await ask(pair, turn, codec)
        assert found.transfer.held_tokens == 192, "the third page holds the answer's first tokens"
        other = await ask(pair, turn, codec, tenant="other")
        assert other.transfer.held_tokens == 0
        if codec == "raw":
            assert other.token_ids == found.token_ids


@pytest.mark.parametrize("answered", [2, 24, 100])  # the page is packed with the answer's end, or on the way
async def test_a_raw_copy_of_the_last_full_page_is_what_a_transfer_brings(answered: int) -> None:
    """Another ending after the same pages gets the tokens that it gets where nothing is held."""
    codec, sampling = "tq-k3v2", Sampling(temperature=0, max_tokens=answered, ignore_eos=True)
    async with pair_of(codec, "dense") as pair:
        await pair.generate(tokens(200), sampling, codec)
        for length in (193, 200, 250):
            prompt = tokens(192) + tokens(length - 192, 5)
            found = await ask(pair, prompt, codec)
            fresh = await ask(pair, prompt, codec, tenant=f"{length}")
            assert (found.transfer.held_tokens, fresh.transfer.held_tokens) == (192, 0)
            assert found.token_ids == fresh.token_ids
        exact = await ask(pair, tokens(192), codec)
        assert exact.transfer.held_tokens == 128, "its last token is computed, and with it its page"


async def test_a_raw_copy_gives_way_where_the_pool_is_full() -> None:
    async with pair_of("tq-k4v4", "dense", pool_tokens=320, prefix_cache=1) as pair:
        await ask(pair, tokens(200), "tq-k4v4")
        assert pair.decode.server.report().pages.cached == 4, "three full pages, and the third one raw"
        long = Sampling(temperature=0, max_tokens=120, ignore_eos=True)
        answer = await pair.generate(tokens(200), long, "tq-k4v4")  # takes all five pages, that of the copy too
        assert len(answer.token_ids) == 120 and answer.transfer.held_tokens == 128


async def test_an_ending_that_is_computed_in_the_pool_leaves_what_a_transfer_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same as with KV as computed beside the pool, whose pages are rounded on their way into it."""
    codec, sampling = "tq-k4v4", Sampling(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    answers = []
    for in_pool in (True, False):
        monkeypatch.setattr(DenseKvPool, "rounds_endings", in_pool)
        async with pair_of(codec, "dense") as pair:
            await ask(pair, tokens(200), codec)
            request = pair.request(tokens(255), sampling, codec)
            del request.prefill_addresses[:]
            events = [event async for event in pair.call(request)]
            assert events[0].transfer.held_tokens == 192 and events[0].transfer.local_tokens == 63
            answers.append(([event.token_ids[0] for event in events], [e.logprobs[0].logprob for e in events]))
    assert answers[0][0] == answers[1][0] and len(answers[0][0]) == 24
    assert answers[0][1] == pytest.approx(answers[1][1], rel=1e-5)


async def test_a_replay_gets_the_whole_prompt_anew_where_pages_are_packed() -> None:
    """Shared pages may come from a conversation: what the lost worker had was the prompt as it is computed."""
    async with pair_of("tq-k4v4", "dense") as pair:
        prompt = tokens(200)
        answer = await ask(pair, prompt, "tq-k4v4")
        request = pair.request(prompt, SHORT, "tq-k4v4")
        request.emitted_token_ids.extend(answer.token_ids[:10])
        rest = await pair.call(request).read()
        assert list(rest.token_ids) == answer.token_ids[10:11] and not rest.transfer.held_tokens


async def test_the_cache_gives_way_to_requests_and_can_be_switched_off() -> None:
    async with pair_of("raw", "dense", pool_tokens=640, prefix_cache=1) as pair:
        for salt in range(5):
            await ask(pair, tokens(300, salt), "raw")
            pages = pair.decode.server.report().pages
            assert pages.cached <= pages.total == 10
        assert pair.decode.server.report().pages.cached > 5
        assert (await ask(pair, tokens(600), "raw")).token_ids
    async with pair_of("raw", "dense", prefix_cache=0) as pair:
        for _ in range(2):
            assert (await ask(pair, tokens(300), "raw")).transfer.held_tokens == 0
        assert pair.decode.server.report().pages.cached == 0
