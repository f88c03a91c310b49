"""Pages that a decode worker holds already are not sent: the same tokens as without, and fewer bytes."""

import asyncio

import pytest
from harness import Answer, Pair, worker_pair
from models import model_path

from isthmus.decode.pages import final_pages, holdable_tokens
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


def test_what_is_final_and_what_may_be_held():
    assert [final_pages(stored, 64, True) for stored in (63, 64, 128, 191, 192, 256)] == [0, 1, 1, 1, 2, 3]
    assert [final_pages(stored, 64, False) for stored in (63, 64, 128)] == [0, 1, 2]
    assert [holdable_tokens(prompt, 64, True) for prompt in (1, 64, 128, 192, 200)] == [0, 0, 64, 128, 128]
    assert [holdable_tokens(prompt, 64, False) for prompt in (1, 64, 65, 128, 129)] == [0, 0, 64, 64, 128]


@pytest.mark.parametrize(("codec", "pool"), POOLS)
async def test_a_prompt_that_was_seen_is_not_sent_again(codec: str, pool: str) -> None:
    async with pair_of(codec, pool) as pair:
        for count in (64, 128, 200):
            prompt = tokens(count)
            holdable = holdable_tokens(count, 64, codec != "raw")
            fresh = await ask(pair, prompt, codec, tenant=f"{count}")
            assert fresh.transfer.held_tokens == 0, "another tenant's pages are never found"
            again = await asyncio.gather(*(ask(pair, prompt, codec, tenant=f"{count}") for _ in range(2)))
            here = await ask(pair, prompt, codec, tenant=f"{count}", local=True)
            for answer in (*again, here):
                if answer is not here or codec == "raw":  # what is computed here attends to packed pages
                    assert answer.token_ids == fresh.token_ids
                assert answer.transfer.held_tokens == holdable
            assert here.transfer.local_tokens == count - holdable
            if holdable:
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
