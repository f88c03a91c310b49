"""Draining and flipping real workers through a gateway, on a small model in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest
from harness import worker_pair
from models import model_path

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.launch.role_host import RoleHost, settings_by_role
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.worker import DecodeWorker
from isthmus.proto.errors import Incompatible
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import WORKER_HEALTH_READY, WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL

MODEL = "tiny-llama"
PROMPT = [(7 * position) % 500 for position in range(300)]
LONG = Sampling(temperature=0, max_tokens=600, ignore_eos=True)
REQUEST = build_request(
    token_ids=PROMPT, codec="raw", sampling={"temperature": 0, "max_tokens": 20, "ignore_eos": True}
)


@dataclass
class Seats:
    """Workers and a gateway that knows them."""

    hosts: list[RoleHost]
    gateway: Gateway
    client: Client


@asynccontextmanager
async def hosts(*roles: str) -> AsyncIterator[Seats]:
    model = model_path(MODEL)
    shared = {"model": model, "dtype": "fp32", "tls": "off"}
    started: list[RoleHost] = []
    gateway = Gateway("127.0.0.1:0", load_served_model(model))
    try:
        for number, role in enumerate(roles):
            settings = {**shared, "name": f"worker-{number}"}
            host = RoleHost(role, settings_by_role(role, settings))  # pyright: ignore[reportArgumentType]
            started.append(host)
            await host.start()
        await gateway.start()
        for host in started:
            gateway.fleet.add(host.address)
        async with asyncio.timeout(30), Client(gateway.address) as client:
            await gateway.ready.wait()
            while any(status.health != WORKER_HEALTH_READY for status in gateway.fleet.statuses()):
                await asyncio.sleep(0.02)
            yield Seats(started, gateway, client)
    finally:
        await gateway.stop()
        for host in started:
            await host.stop()


async def test_two_orders_to_flip_at_a_time_are_one_flip() -> None:
    async with hosts("prefill", "prefill", "decode") as cluster:
        host = cluster.hosts[1]
        assert await host.prepare_flip(WORKER_ROLE_DECODE)
        for _ in range(2):
            host.flip(WORKER_ROLE_DECODE)
        async with asyncio.timeout(30):
            while host.role != "decode":
                await asyncio.sleep(0.01)
        host.flip(WORKER_ROLE_DECODE)
        await asyncio.sleep(0.2)
        assert (host.role, host.server.instance.partition(".")[2]) == ("decode", "2")  # its second worker, no third


class Noting:
    """A manager of workers that notes their roles."""

    def __init__(self) -> None:
        self.roles: list[int] = []

    def set_role(self, address: str, role: int) -> None:
        self.roles.append(role)


async def test_a_flip_whose_caller_goes_away_is_known_to_the_manager() -> None:
    async with hosts("prefill", "prefill", "decode") as cluster:
        cluster.gateway.operations.manager = manager = Noting()  # pyright: ignore[reportAttributeAccessIssue]
        flipping = asyncio.create_task(cluster.gateway.operations.flip("worker-1", WORKER_ROLE_DECODE, 5))
        while not manager.roles:
            await asyncio.sleep(0)
        flipping.cancel()
        async with asyncio.timeout(30):
            while [status.role for status in cluster.gateway.fleet.statuses()].count(WORKER_ROLE_DECODE) < 2:
                await asyncio.sleep(0.02)
        assert (cluster.hosts[1].role, manager.roles) == ("decode", [WORKER_ROLE_DECODE])


async def test_a_worker_changes_its_role_and_back_on_the_same_weights() -> None:
    async with hosts("prefill", "prefill", "decode") as cluster:
        before = (await cluster.client.answer(REQUEST)).token_ids
        host = cluster.hosts[1]
        address, model = host.address, host._worker.model  # pyright: ignore[reportOptionalMemberAccess]
        for role in (WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL):
            report = await cluster.gateway.operations.flip("worker-1", role, 5)
            assert (report.role, report.address, report.worker_id) == (role, address, "worker-1")
            assert host._worker.model is model  # pyright: ignore[reportOptionalMemberAccess]
            answers = await asyncio.gather(*(cluster.client.answer(REQUEST) for _ in range(4)))
            assert [answer.token_ids for answer in answers] == [before] * 4
        assert (await cluster.gateway.operations.flip("worker-1", WORKER_ROLE_PREFILL, 5)).address == address
        with pytest.raises(Incompatible, match="worker-2 is the only worker of its role"):
            await cluster.gateway.operations.flip("worker-2", WORKER_ROLE_PREFILL, 5)


async def test_a_worker_that_cannot_take_the_other_role_goes_on_in_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_room(self: DecodeWorker, model: object = None) -> None:
        raise MemoryError("no room for the pool")

    async with hosts("prefill", "prefill", "decode") as cluster:
        monkeypatch.setattr(DecodeWorker, "start", no_room)
        with pytest.raises(Incompatible, match="worker-1 goes on in its role: no room for the pool"):
            await cluster.gateway.operations.flip("worker-1", WORKER_ROLE_DECODE, 5)
        answers = await asyncio.gather(*(cluster.client.answer(REQUEST) for _ in range(4)))
        assert [len(answer.token_ids) for answer in answers] == [20] * 4
        assert [host.role for host in cluster.hosts] == ["prefill", "prefill", "decode"]


async def test_a_drained_worker_takes_nothing_and_ends_its_process() -> None:
    async with hosts("prefill", "prefill", "decode") as cluster:
        drained = cluster.hosts[0]
        running = asyncio.create_task(cluster.client.answer(REQUEST))
        await asyncio.sleep(0)
        done = await cluster.gateway.operations.drain("worker-0", 5)
        assert done.handed_over == 0
        await asyncio.wait_for(drained.drained.wait(), 5)
        assert len((await running).token_ids) == 20
        assert [load.address for load in cluster.gateway.fleet.table.routing.prefill] == [cluster.hosts[1].address]
        assert len((await cluster.client.answer(REQUEST)).token_ids) == 20
        with pytest.raises(Incompatible, match="was given a list of workers"):
            await cluster.gateway.operations.scale(2, None, 5)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_what_still_runs_after_the_timeout_is_handed_over(role: str) -> None:
    async with worker_pair(model_path(MODEL), prefill={"chunk_tokens": 64}) as pair:
        call = pair.call(pair.request(PROMPT, LONG))
        if role == "decode":
            assert (await call.read()).token_ids
        else:
            while not pair.prefill.server.report().running_requests:
                await asyncio.sleep(0.001)
        drained = await getattr(pair, role).drain(0.0)
        assert (drained.finished, drained.handed_over) == (0, 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read():
                continue
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "was drained: the request goes on elsewhere" in (caught.value.details() or "")
        await pair.baseline()


async def test_a_request_that_ends_in_time_is_not_handed_over() -> None:
    async with worker_pair(model_path(MODEL)) as pair:
        answer = asyncio.create_task(pair.generate(PROMPT, Sampling(temperature=0, max_tokens=10, ignore_eos=True)))
        while not pair.decode.server.report().running_requests:
            await asyncio.sleep(0.001)
        drained = await pair.decode.drain(20)
        assert (drained.finished, drained.handed_over) == (1, 0)
        assert len((await answer).token_ids) == 10
