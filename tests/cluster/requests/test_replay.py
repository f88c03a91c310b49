"""A decode worker is lost in the middle of an answer: the client sees one whole answer, and no token twice."""

import asyncio

import grpc
import grpc.aio
import pytest
from scripted import Script, scripted_cluster, served

from isthmus.cluster.client.client import Answer, Client, build_request
from isthmus.cluster.fleet import worker_table
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.requests.generator import Generator
from isthmus.cluster.requests.retry import Failures
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH, PRIORITY_BATCH, TransferStats
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.errors import Corrupt, Exhausted, InvalidRequest, IsthmusError, Unavailable
from isthmus.proto.generation_pb2 import GenerateEvent, GenerateRequest
from isthmus.worker import service

TEXT = "one twö three END four"


def writes(text: str, *, at_most: int = 1000, then: Exception | None = None) -> Script:
    """A worker that goes on after the tokens that were emitted; after `at_most` of its own it fails, or hangs."""

    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        tokens = list(text.encode())
        emitted = len(request.emitted_token_ids)
        assert tokens[:emitted] == list(request.emitted_token_ids)
        for token in tokens[emitted : emitted + at_most]:
            await context.write(DecodeEvent(token_ids=[token]))
        if emitted + at_most < len(tokens):
            if then is not None:
                raise then
            await asyncio.Event().wait()
        await context.write(DecodeEvent(finish_reason=FINISH_REASON_LENGTH, transfer=TransferStats(frames=3)))

    return script


async def events_of(client: Client, request: GenerateRequest) -> tuple[Answer, list[GenerateEvent]]:
    events: list[GenerateEvent] = []
    answer = await client.answer(request, on_event=events.append, timeout_s=20)
    return answer, events


@pytest.mark.parametrize("error", [Unavailable("gone"), Corrupt("damaged twice")])
@pytest.mark.parametrize("at_most", [1, 5, 6, 16])  # 6 ends within a character, 16 within the stop string
async def test_the_answer_goes_on_elsewhere(at_most: int, error: IsthmusError) -> None:
    failing = writes(TEXT, at_most=at_most, then=error)
    async with (
        scripted_cluster(failing, failing, writes(TEXT)) as cluster,
        Client(cluster.gateway.address) as client,
    ):
        request = build_request(prompt="x", sampling={"stop": ["END"], "seed": 3})
        answer, events = await events_of(client, request)
        assert (answer.text, answer.finish) == ("one twö three ", "stop")
        assert bytes(answer.token_ids).decode() == "one twö three END"
        indexes = [event.index for event in events if event.token_ids]
        assert indexes == list(range(len(answer.token_ids)))
        asked = [request for worker in cluster.decodes for request in worker.requests]
        assert answer.timings.replays == len(asked) - 1
        assert len({request.request_id for request in asked}) == len(asked)  # frames of one are not those of another
        assert {request.sampling.SerializeToString() for request in asked} == {asked[0].sampling.SerializeToString()}


async def test_the_same_worker_once_it_is_back() -> None:
    scripts = iter([writes(TEXT, at_most=4), writes(TEXT)])

    async def next_script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await next(scripts)(request, context)

    async with scripted_cluster(next_script) as cluster, Client(cluster.gateway.address) as client:
        worker = cluster.decodes[0]
        address = worker.address
        running = asyncio.create_task(events_of(client, build_request(prompt="x")))
        async with asyncio.timeout(5):
            while not worker.requests:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await worker.stop()
        await asyncio.sleep(1.5)  # longer than a request waits where no worker was ever there
        await worker.start(address)
        answer, _ = await running
        assert (answer.text, answer.timings.replays) == (TEXT, 1)
        assert bytes(worker.requests[1].emitted_token_ids) == TEXT.encode()[:4]


async def test_a_worker_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_table, "SUSPECT_S", 0.3)
    monkeypatch.setattr(worker_table, "OUT_S", 0.6)
    monkeypatch.setattr(service, "HEARTBEAT_S", 0.1)
    async with (
        scripted_cluster(writes(TEXT, at_most=3), writes(TEXT, at_most=3)) as cluster,
        Client(cluster.gateway.address) as client,
    ):
        running = asyncio.create_task(events_of(client, build_request(prompt="x")))
        async with asyncio.timeout(5):
            while not any(worker.requests for worker in cluster.decodes):
                await asyncio.sleep(0.01)
        first, other = sorted(cluster.decodes, key=lambda worker: -len(worker.requests))
        other.script = writes(TEXT)
        first.silent.set()  # its connection stays, as that of a stopped process does
        answer, _ = await running
        assert (answer.text, answer.timings.replays) == (TEXT, 1)
        async with asyncio.timeout(5):
            while not first.cancelled:
                await asyncio.sleep(0.01)


async def test_what_can_never_work_is_not_tried_again() -> None:
    scripts = [writes(TEXT, at_most=2, then=InvalidRequest("no"))] * 2
    async with scripted_cluster(*scripts) as cluster, Client(cluster.gateway.address) as client:
        with pytest.raises(grpc.aio.AioRpcError, match="no"):
            await client.answer(build_request(prompt="x"))
        assert sum(len(worker.requests) for worker in cluster.decodes) == 1


async def test_replays_are_bounded() -> None:
    scripts = [writes(TEXT, at_most=1, then=Unavailable("gone"))] * 3
    async with scripted_cluster(*scripts, replays=2) as cluster, Client(cluster.gateway.address) as client:
        text = ""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for event in client.generate(build_request(prompt="x")):
                text += event.text
        assert (text, raised.value.code()) == ("one", grpc.StatusCode.UNAVAILABLE)
        assert "gone" in (raised.value.details() or "")


async def test_a_lost_end_needs_no_worker() -> None:
    async with (
        scripted_cluster(writes(TEXT, at_most=4, then=Unavailable("gone"))) as cluster,
        Client(cluster.gateway.address) as client,
    ):
        answer, _ = await events_of(client, build_request(prompt="x", sampling={"max_tokens": 4}))
        assert (answer.text, answer.finish, answer.timings.replays) == ("one ", "length", 0)


@pytest.mark.parametrize("count", [0, 6, 16])
async def test_an_answer_that_another_gateway_began(count: int) -> None:
    async with scripted_cluster(writes(TEXT)) as cluster:
        generator = Generator(served(), cluster.gateway.fleet, GatewayConfig())
        request = build_request(prompt="x", sampling={"stop": ["END"]})
        request.tenant, request.priority = "t", PRIORITY_BATCH
        resolved = await generator.resolve(request)
        emitted = list(TEXT.encode())[:count]
        events: list[GenerateEvent] = []

        async def take(event: GenerateEvent) -> None:
            events.append(event)

        session = await generator.run(resolved, take, emitted=emitted)
        before = bytes(emitted).decode(errors="ignore").removesuffix("E").removesuffix("EN")
        assert before + "".join(event.text for event in events) == "one twö three "
        assert events[0].index == count
        assert session.token_ids == list(b"one tw\xc3\xb6 three END")
        assert (events[-1].usage.output_tokens, events[-1].timings.replays) == (len(session.token_ids), 0)
        asked = cluster.decodes[0].requests[0]
        assert (asked.tenant, asked.priority, asked.allow_local_prefill) == ("t", PRIORITY_BATCH, True)


async def test_tenants_share_no_pages() -> None:
    async with scripted_cluster(writes("x"), local_prefill="never") as cluster:
        async with Client(cluster.gateway.address) as client:
            request = build_request(prompt="p" * 64, codec="raw")
            for tenant in ("", "a", "b"):
                request.tenant = tenant
                await client.answer(request)
        asked = cluster.decodes[0].requests
        assert len({bytes(request.page_hashes) for request in asked}) == 3
        assert not any(request.allow_local_prefill for request in asked)


def test_what_is_avoided() -> None:
    failures = Failures(limit=3, wait_s=10)
    generation = {"a": 1, "b": 1}
    assert list(failures.avoid(0.0, generation.__getitem__)) == [set()]
    failures.add("a", Unavailable("gone"), 1.0, 1)
    failures.add("b", Unavailable("gone"), 2.0, 1)
    assert list(failures.avoid(2.1, generation.__getitem__)) == [{"a", "b"}, {"b"}]  # a may be asked again after 0.5 s
    generation["b"] = 2  # was started anew
    assert list(failures.avoid(2.1, generation.__getitem__)) == [{"a", "b"}, set()]
    assert failures.wait_left(3.0, started=False) == 10
    assert failures.wait_left(5.0, started=False) == 8
    failures.add("a", Exhausted("full"), 6.0, 1)
    assert list(failures.avoid(6.6, generation.__getitem__))[-1] == {"a"}  # the second time it is given longer
    assert failures.wait_left(6.0, started=False) == 0
    assert failures.wait_left(6.0, started=True) == 10
    failures.add("a", Unavailable("gone"), 7.0, 1)
    assert not list(failures.avoid(20.0, generation.__getitem__))
    assert failures.wait_left(7.0, started=True) == 0
