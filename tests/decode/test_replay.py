"""What a decode worker computes itself: output of a lost worker that is replayed, and prompts with no prefill worker.

Both must go on exactly as the undisturbed request does, also where pages are packed with loss.
"""

import asyncio

import grpc
import grpc.aio
import pytest
from harness import Answer, Pair, worker_pair
from models import model_path

from isthmus.kernels.cpu.half_gemm import has_half_tiles
from isthmus.model.cpu.speed_up import computes_bf16
from isthmus.proto.common_pb2 import FinishReason
from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.sampling import Sampling

TOKENS = 140
GREEDY = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
SEEDED = Sampling(
    temperature=0.8, top_p=0.95, seed=11, max_tokens=TOKENS, ignore_eos=True, presence_penalty=0.5, logprobs=1
)
PROMPT = [(17 * position + 3) % 500 for position in range(200)]
POOLS = [("raw", "dense"), ("tq-k4v4", "dense"), ("tq-k4v4", "packed")]


def pair_of(codec: str, pool: str, **decode: int):
    """With no pages from earlier requests: the whole prompt is sent, or computed, each time."""
    own = {"default_codec": codec}
    return worker_pair(model_path("tiny-llama"), prefill=own, decode=own | {"pool": pool, "prefix_cache": 0} | decode)


async def answer(pair: Pair, request: DecodeRequest) -> Answer:
    """All of a request's answer; how many tokens came by event is checked on the way."""
    whole = Answer()
    transfers = []
    async for event in pair.call(request):
        whole.token_ids += event.token_ids
        whole.finish = event.finish_reason or whole.finish
        transfers.append(event.HasField("transfer"))
        if event.HasField("transfer"):
            whole.transfer = event.transfer
    assert sum(transfers) == 1 and any(transfers[:2]), "statistics come once, and early"
    return whole


@pytest.mark.parametrize(("codec", "pool"), POOLS)
async def test_a_replay_goes_on_where_the_lost_worker_stopped(codec: str, pool: str) -> None:
    async with pair_of(codec, pool) as pair:

        async def check(sampling: Sampling) -> list[bool]:
            whole = await pair.generate(PROMPT, sampling, codec)
            same = []
            for emitted, local in ((1, False), (63, False), (64, False), (65, False), (130, False), (130, True)):
                request = pair.request(PROMPT, sampling, codec)
                request.emitted_token_ids.extend(whole.token_ids[:emitted])
                if local:
                    del request.prefill_addresses[:]
                rest = await answer(pair, request)
                assert len(rest.token_ids) == TOKENS - emitted and rest.finish == FinishReason.FINISH_REASON_LENGTH
                assert rest.transfer.local_tokens == (len(PROMPT) if local else 0)
                same.append(whole.token_ids[:emitted] + rest.token_ids == whole.token_ids)
            return same

        same = await check(GREEDY) + await check(SEEDED)
        # Chunks round otherwise than single tokens do: where that turns a code of a packed page, a near tie may turn.
        assert same.count(False) <= (codec != "raw"), same
        assert pair.decode.server.report().counters["replayed_tokens"] > 2 * (64 + 130)


@pytest.mark.skipif(computes_bf16() or not has_half_tiles(), reason="this CPU multiplies otherwise")
async def test_a_replay_is_the_same_to_the_last_bit() -> None:
    """Tokens of a lost worker are attended to one by one: not even what a codec could make more of is different."""
    sampling = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
    settings = {"dtype": "bf16", "default_codec": "tq-k4v4", "pool": "dense", "prefix_cache": 0}
    worker = {key: settings[key] for key in ("dtype", "default_codec")}
    async with worker_pair(model_path("tiny-llama"), prefill=worker, decode=settings) as pair:

        async def told(emitted: list[int]) -> tuple[list[int], list[float]]:
            request = pair.request(PROMPT, sampling, "tq-k4v4")
            request.emitted_token_ids.extend(emitted)
            events = [event async for event in pair.call(request)]
            tokens = [token for event in events for token in event.token_ids]
            return tokens, [logprob.logprob for event in events for logprob in event.logprobs]

        tokens, logprobs = await told([])
        for emitted in (2, 57, 60, 100):  # a page is packed after 56
            rest = await told(tokens[:emitted])
            assert rest == (tokens[emitted:], logprobs[emitted:])


@pytest.mark.parametrize(("codec", "pool"), POOLS)
async def test_a_prompt_computed_here_is_as_one_that_was_sent(codec: str, pool: str) -> None:
    """Lengths around every border of the packed range, beside running requests and alone."""
    async with pair_of(codec, pool, chunk_tokens=64) as pair:
        prompts = [[(7 * position + tokens) % 500 for position in range(tokens)] for tokens in (1, 64, 130, 192, 330)]
        sampling = Sampling(temperature=0, max_tokens=40, ignore_eos=True)
        sent = await asyncio.gather(*(pair.generate(prompt, sampling, codec) for prompt in prompts))
        requests = [pair.request(prompt, sampling, codec) for prompt in prompts]
        for request in requests:
            del request.prefill_addresses[:]
        here = await asyncio.gather(*(answer(pair, request) for request in requests))
        assert [a.token_ids for a in here] == [a.token_ids for a in sent]
        for prompt, result in zip(prompts, here, strict=True):
            stats = result.transfer
            assert stats.local_tokens == len(prompt) and stats.prefill_ms > 0 and stats.first_token_unix_ns > 0
            assert not stats.kv_bytes_wire and not stats.prefill_worker


async def test_where_every_prefill_worker_fails_the_prompt_is_computed_here_if_allowed() -> None:
    async with pair_of("tq-k4v4", "dense") as pair:
        whole = await pair.generate(PROMPT, GREEDY, "tq-k4v4")
        request = pair.request(PROMPT, GREEDY, "tq-k4v4")
        await pair.prefill.server.close()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(pair, request)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        request.allow_local_prefill = True
        assert (await answer(pair, request)).token_ids == whole.token_ids
        assert pair.decode.server.report().counters["prefills_taken_over"] == 1


async def test_output_that_is_complete_is_not_replayed() -> None:
    async with pair_of("raw", "dense") as pair:
        short = Sampling(temperature=0, max_tokens=3, stop_token_ids=frozenset({9}), ignore_eos=True)
        for emitted, text in (([1, 2, 3], "number 3 of 3"), ([9, 1], "number 1 of 2"), ([512], "vocabulary")):
            request = pair.request([5], short)
            request.emitted_token_ids.extend(emitted)
            with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
                await answer(pair, request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
