"""Wherever a client goes away, both workers are back at their baseline within 5 s: 50 times in a row at each point."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from harness import Pair, worker_pair
from models import model_path

from isthmus.proto.sampling import Sampling

LONG = Sampling(temperature=0, max_tokens=200, ignore_eos=True)
PROMPT = [(7 * position) % 500 for position in range(700)]
CANCELS = 50

Started = Callable[[Pair], Awaitable[None]]


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Returns once `condition` holds; TimeoutError after `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.001)


async def cancelled(call) -> None:
    """Cancels a call as a client that goes away does."""
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()


async def test_while_queued_for_pages() -> None:
    async with worker_pair(model_path("tiny-llama"), decode={"pool_tokens": 960}) as pair:
        for _ in range(CANCELS):
            holder = pair.call(pair.request(PROMPT, LONG))
            assert (await holder.read()).token_ids
            in_use = pair.pages_in_use()[1]
            queued = pair.call(pair.request(PROMPT[::-1], LONG))
            await until(lambda: pair.decode.server.report().waiting_requests == 1)
            assert pair.pages_in_use()[1] == in_use, "a queued request holds nothing"
            await cancelled(queued)
            await until(lambda: pair.decode.server.report().waiting_requests == 0)
            await cancelled(holder)
            await pair.baseline()


async def test_in_prefill() -> None:
    settings = {"chunk_tokens": 64}
    async with worker_pair(model_path("tiny-llama"), prefill=settings) as pair:
        seen = 0
        for number in range(CANCELS):
            call = pair.call(pair.request([number, *PROMPT[1:]], LONG))  # a new one: nothing of it is cached
            await until(lambda: min(pair.pages_in_use()) > 0)
            seen += pair.prefill.server.report().waiting_tokens > 0
            await cancelled(call)
            await pair.baseline()
        assert seen > CANCELS // 2, "most cancels must hit a prompt that is still computed"


async def test_in_transfer() -> None:
    """After the first token, while pages are still on their way."""
    async with worker_pair(model_path("tiny-llama")) as pair:
        for _ in range(CANCELS):
            call = pair.call(pair.request(PROMPT, LONG))
            assert (await call.read()).token_ids
            await cancelled(call)
            await pair.baseline()


async def test_in_decode() -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        for _ in range(CANCELS):
            call = pair.call(pair.request(PROMPT, LONG))
            for _ in range(3):
                assert (await call.read()).token_ids
            assert pair.pages_in_use()[1] > 0
            await cancelled(call)
            await pair.baseline()


async def test_a_storm_of_cancels_at_random_moments() -> None:
    async with worker_pair(model_path("tiny-llama"), prefill={"chunk_tokens": 64}) as pair:

        async def come_and_go(number: int) -> None:
            call = pair.call(pair.request(PROMPT[: 50 + 13 * number], LONG))
            await asyncio.sleep((number * 37 % 50) / 100)
            await cancelled(call)

        await asyncio.gather(*(come_and_go(number) for number in range(CANCELS)))
        await pair.baseline()
        answer = await pair.generate(PROMPT[:100], Sampling(temperature=0, max_tokens=5, ignore_eos=True))
        assert len(answer.token_ids) == 5, "and both still work"


async def test_a_deadline_ends_a_request_at_every_hop() -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        for prompt, timeout_s in ((PROMPT, 0.01), (PROMPT, 0.05), (PROMPT[:100], 0.2)):  # in prefill, then in decode
            call = pair.call(pair.request(prompt, replace(LONG, max_tokens=900)), timeout_s=timeout_s)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read():
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await pair.baseline()


async def test_a_prefill_worker_that_goes_away_is_an_error_not_a_hang() -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        await pair.prefill.server.close()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair.generate(PROMPT, LONG)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert pair.prefill.address in (caught.value.details() or "")
        await pair.baseline()
