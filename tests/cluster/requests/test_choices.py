"""Several answers to one prompt, against workers that follow a script."""

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio
import pytest
from scripted import Script, scripted_cluster

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.requests import prepare
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_UNSPECIFIED, TransferStats
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.generation_pb2 import GenerateEvent, GenerateRequest

DONE = TransferStats(frames=3, held_tokens=64)


def asked(n: int, **sampling: object) -> GenerateRequest:
    request = build_request(prompt="p" * 70, codec="raw", sampling={"n": n, "seed": 2**64 - 2, **sampling})
    request.return_prompt_token_ids = True
    return request


def tells_its_seed(*, kv: asyncio.Event | None = None) -> Script:
    """A worker that says the last digit of its seed, then waits for `kv`, then reports its transfer and ends."""

    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        digit = str(request.sampling.seed % 10).encode()[0]
        first = DecodeEvent(token_ids=[digit], transfer=TransferStats(partial=True, attempt=1))
        await context.write(first)
        if kv is not None:
            await kv.wait()
        await context.write(DecodeEvent(token_ids=[digit], transfer=DONE))
        await context.write(DecodeEvent(finish_reason=FINISH_REASON_LENGTH))

    return script


async def test_each_answer_has_a_seed_of_its_own_and_the_prompt_counts_once() -> None:
    async with scripted_cluster(tells_its_seed()) as cluster, Client(cluster.gateway.address) as client:
        events: list[GenerateEvent] = []
        answers = await client.answers(asked(3), on_event=events.append)
        assert [answer.text for answer in answers] == ["44", "55", "00"]  # 2**64 - 2, 2**64 - 1, 0
        assert [answer.timings.seed for answer in answers] == [2**64 - 2, 2**64 - 1, 0]
        assert [answer.prompt_token_ids for answer in answers] == [[112] * 70, [], []]
        ends = [event for event in events if event.finish_reason != FINISH_REASON_UNSPECIFIED]
        assert [event.HasField("usage") for event in ends] == [False, False, True]
        assert (ends[-1].usage.prompt_tokens, ends[-1].usage.output_tokens) == (70, 6)
        requests = cluster.decodes[0].requests
        assert len({request.request_id for request in requests}) == 3
        assert {request.sampling.n for request in requests} == {3}
        assert len({bytes(request.page_hashes) for request in requests}) == 1


async def test_the_others_wait_for_the_prompt_and_go_where_it_is() -> None:
    kv = asyncio.Event()
    scripts = [tells_its_seed(kv=kv)] * 3
    async with scripted_cluster(*scripts) as cluster, Client(cluster.gateway.address) as client:
        running = asyncio.create_task(client.answers(asked(5)))
        async with asyncio.timeout(5):
            while not any(worker.requests for worker in cluster.decodes):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert sum(len(worker.requests) for worker in cluster.decodes) == 1
        kv.set()
        assert [answer.finish for answer in await running] == ["length"] * 5
        assert sorted(len(worker.requests) for worker in cluster.decodes) == [0, 0, 5]


async def test_pages_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = list[int]()
    own = prepare.page_hashes

    def counted(token_ids: Sequence[int], page_tokens: int, salt: bytes) -> bytes:
        hashed.append(len(token_ids))
        return own(token_ids, page_tokens, salt)

    monkeypatch.setattr(prepare, "page_hashes", counted)
    async with scripted_cluster(tells_its_seed()) as cluster, Client(cluster.gateway.address) as client:
        for tenant in ("a", "b"):
            request = asked(5)
            request.tenant = tenant
            await client.answers(request)
        assert hashed == [70, 70]
        assert [len(request.page_hashes) for request in cluster.decodes[0].requests] == [16] * 10


async def test_one_that_fails_ends_all() -> None:
    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await context.write(DecodeEvent(token_ids=[65], transfer=DONE))
        if request.sampling.seed == 9:
            await asyncio.sleep(0.2)
            raise InvalidRequest("not this one")
        await asyncio.Event().wait()

    async with scripted_cluster(script) as cluster, Client(cluster.gateway.address) as client:
        with pytest.raises(grpc.aio.AioRpcError, match="not this one"):
            await client.answers(asked(4, seed=7))
        async with asyncio.timeout(5):
            while cluster.decodes[0].cancelled < 3:
                await asyncio.sleep(0.01)
            await cluster.gateway.load.wait_idle()


async def test_a_client_that_goes_away_cancels_all() -> None:
    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await context.write(DecodeEvent(token_ids=[65], transfer=DONE))
        await asyncio.Event().wait()

    async with scripted_cluster(script) as cluster, Client(cluster.gateway.address) as client:
        events = client.generate(asked(4))
        seen = set[int]()
        while len(seen) < 4:
            seen.add((await asyncio.wait_for(anext(events), 5)).choice)
        await events.aclose()
        async with asyncio.timeout(5):
            while cluster.decodes[0].cancelled < 4:
                await asyncio.sleep(0.01)
            await cluster.gateway.load.wait_idle()


async def test_the_budget_is_that_of_all_answers() -> None:
    async with scripted_cluster(tells_its_seed(), max_request_tokens=100) as cluster:
        async with Client(cluster.gateway.address) as client:
            assert len(await client.answers(asked(3, max_tokens=10))) == 3
            with pytest.raises(grpc.aio.AioRpcError, match="prompt and output come to 110 tokens; allowed: 100"):
                await client.answers(asked(4, max_tokens=10))
        assert len(cluster.decodes[0].requests) == 3
