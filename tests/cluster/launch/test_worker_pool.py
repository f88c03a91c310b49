"""Detached workers that are adopted, started, scaled and lost, with a Ray of scripted workers."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted import Scripted, report_of, says, scripted_cluster, served

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.config import ClusterConfig
from isthmus.cluster.fleet.report import Role
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.launch.detached import kept_worker
from isthmus.cluster.launch.detached.desired import Desired, Wanted
from isthmus.cluster.launch.detached.server import SupervisorServer
from isthmus.proto.errors import IllegalState, Incompatible, NotFound, Unavailable
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_INCOMPATIBLE,
    WORKER_HEALTH_STARTING,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    PageCounts,
)
from isthmus.worker.service import Drained

NUMBER_OF = {"prefill": WORKER_ROLE_PREFILL, "decode": WORKER_ROLE_DECODE}


@dataclass
class FakeActor:
    """A detached worker. `placed`: a host was found for it; then it serves at once."""

    name: str
    its_role: Role
    worker: Scripted
    placed: asyncio.Event = field(default_factory=asyncio.Event)
    died: asyncio.Event = field(default_factory=asyncio.Event)
    drained: bool = False
    drained_here: bool = False  # by an order that went past the supervisor

    async def address(self) -> str:
        if self.died.is_set():
            raise Unavailable("it died for good")
        await self.placed.wait()
        if self.worker.server is None:
            await self.worker.start()
        return self.worker.address

    async def activity(self) -> str:
        return "reading weights"

    async def role(self) -> Role:
        return self.its_role

    async def wait_closed(self) -> bool:
        await self.died.wait()
        return self.drained_here

    async def drain(self, timeout_s: float) -> Drained:
        self.drained = True
        return Drained(finished=1, handed_over=0)

    async def stop(self) -> None:
        self.died.set()
        if self.worker.server is not None:
            server, self.worker.server = self.worker.server, None
            await server.stop()


@dataclass
class FakeRay:
    """Where detached workers are; it outlives the supervisors that use it. `room`: hosts for each role."""

    room: dict[Role, int] = field(default_factory=lambda: {"prefill": 8, "decode": 8})
    actors: dict[str, FakeActor] = field(default_factory=dict)
    stored: bytes | None = None
    requests: list[dict[str, int]] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)
    missing: int = 0  # tries to join that fail
    head_died: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        if self.missing:
            self.missing -= 1
            raise Unavailable("no Ray there")

    async def lost(self) -> None:
        await self.head_died.wait()

    async def close(self) -> None:
        pass

    async def launch(self, role: Role, name: str) -> FakeActor:
        assert name not in await self.existing(), "two of one name"
        report = report_of(NUMBER_OF[role], worker_id=name)
        self.actors[name] = actor = FakeActor(name, role, Scripted(report, says("hello")))
        self.launched.append(name)
        self.place()
        return actor

    def place(self) -> None:
        """Places what waits, as far as there is room."""
        for actor in self.actors.values():
            there = [one for one in self.actors.values() if one.placed.is_set() and not one.died.is_set()]
            if sum(one.its_role == actor.its_role for one in there) < self.room[actor.its_role]:
                actor.placed.set()

    async def find(self, name: str) -> FakeActor:
        if name not in await self.existing():
            raise NotFound(name)
        return self.actors[name]

    async def existing(self) -> list[str]:
        return [name for name, actor in self.actors.items() if not actor.died.is_set()]

    async def waits_for(self, worker: FakeActor, role: Role) -> str:
        return "" if worker.placed.is_set() else f"waits for a node with {{{role}: 1}}"

    async def request(self, counts: Mapping[Role, int]) -> None:
        self.requests.append(dict(counts))

    async def load(self) -> Desired | None:
        return Desired.from_json(self.stored) if self.stored else None

    async def save(self, desired: Desired) -> None:
        self.stored = desired.to_json()

    async def end(self) -> None:
        for actor in self.actors.values():
            await actor.stop()


@asynccontextmanager
async def supervised(ray: FakeRay, **settings: int) -> AsyncIterator[SupervisorServer]:
    config = ClusterConfig(cluster_id="test", tls="off", supervisor={"listen": "127.0.0.1:0"}, **settings)  # pyright: ignore
    running = SupervisorServer(config, ray)
    try:
        await running.start()
        yield running
    finally:
        await running.stop()
        assert running.transport.open_channels == 0


@asynccontextmanager
async def following(supervisor: str, **settings: object) -> AsyncIterator[Gateway]:
    config = GatewayConfig(**{"preflight": False, "supervisor": supervisor, **settings})  # pyright: ignore
    gateway = Gateway("127.0.0.1:0", served(), config=config)
    try:
        await gateway.start()
        yield gateway
    finally:
        await gateway.stop()
        assert gateway.transport.open_channels == 0


@pytest.fixture
async def ray() -> AsyncIterator[FakeRay]:
    made = FakeRay()
    yield made
    await made.end()


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not true():
            await asyncio.sleep(0.01)


def there(running: SupervisorServer) -> dict[str, str]:
    """Addresses of the workers that are there."""
    return {one.name: one.address for one in running.pool.listed() if one.address}


async def test_the_next_supervisor_adopts_what_runs_and_doubles_nothing(ray: FakeRay) -> None:
    async with supervised(ray, decode=2) as first:
        await until(lambda: len(there(first)) == 3)
        before = there(first)
        await first.operations.scale(2, None, 5)
        await until(lambda: len(there(first)) == 4 and len(Desired.from_json(ray.stored or b"").workers) == 4)  # pyright: ignore
        before = there(first)
    assert not any(actor.died.is_set() for actor in ray.actors.values())
    async with supervised(ray, decode=2) as second:
        assert there(second) == before, "listed at once, with what it was told of them"
        await until(lambda: len(second.fleet.table.routing.decode) == 2)
        assert len(ray.launched) == 4
    async with supervised(ray, decode=3) as third:  # where the settings file has changed it wins, else what was scaled
        await until(lambda: len(there(third)) == 5)
        assert sorted(there(third)) == ["decode-0", "decode-1", "decode-2", "prefill-0", "prefill-1"]


async def test_what_is_gone_meanwhile_is_started_anew(ray: FakeRay) -> None:
    async with supervised(ray) as first:
        await until(lambda: len(there(first)) == 2)
    await ray.actors["decode-0"].stop()
    async with supervised(ray) as second:
        await until(lambda: len(there(second)) == 2)
        assert ray.launched == ["prefill-0", "decode-0", "decode-0"]


async def test_a_record_of_another_version_loses_no_worker(ray: FakeRay) -> None:
    async with supervised(ray, decode=3) as first:
        await until(lambda: len(there(first)) == 4)
    ray.stored = b'{"version": 99}'
    async with supervised(ray) as second:
        await until(lambda: len(there(second)) == 4)
    assert len(ray.launched) == 4


async def test_who_waits_for_a_host_keeps_nobody_waiting(ray: FakeRay) -> None:
    ray.room["prefill"] = 1
    async with supervised(ray, prefill=2) as running:
        await until(lambda: sorted(there(running)) == ["decode-0", "prefill-0"])
        async with Client(running.address, admin=running.address) as client:
            await until(lambda: any("waits for a node" in one.reason for one in running.pool.listed()))
            worker = next(one for one in (await client.status()).workers if one.worker_id == "prefill-1")
            assert (worker.health, worker.reason) == (WORKER_HEALTH_STARTING, "waits for a node with {prefill: 1}")
        ray.room["prefill"] = 2
        ray.place()
        await until(lambda: "prefill-1" in there(running))


async def test_a_worker_that_died_is_listed_no_more_and_comes_back(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_worker, "RESTART_PAUSE_S", 0.05)
    async with supervised(ray) as running:
        await until(lambda: len(there(running)) == 2)
        before = there(running)["decode-0"]
        ray.room["decode"] = 0
        await ray.actors["decode-0"].stop()
        await until(lambda: "decode-0" not in there(running))
        assert before not in running.fleet.table
        await until(lambda: "waits for a node with {decode: 1}" in "".join(one.reason for one in running.pool.listed()))
        ray.room["decode"] = 1
        ray.place()
        await until(lambda: "decode-0" in there(running))


async def test_a_worker_that_was_drained_on_its_host_is_started_elsewhere_at_once_and_says_so(ray: FakeRay) -> None:
    async with supervised(ray) as running:
        await until(lambda: len(there(running)) == 2)
        ray.room["decode"] = 0
        ray.actors["decode-0"].drained_here = True
        await ray.actors["decode-0"].stop()
        await until(lambda: "decode-0" not in there(running))
        reason = next(one.reason for one in running.pool.listed() if one.name == "decode-0")
        assert reason == "it was drained on its host, another one is asked for"
        await until(lambda: ray.launched.count("decode-0") == 2)
        ray.room["decode"] = 1
        ray.place()
        await until(lambda: "decode-0" in there(running))


async def test_a_status_tells_how_many_there_shall_be(ray: FakeRay) -> None:
    async with supervised(ray, decode=2) as running, following(running.address) as gateway:
        await until(lambda: len(there(running)) == 3)
        await running.operations.scale(0, None, 5)
        async with Client(running.address, admin=running.address) as client:
            status = await client.status()
            assert (dict(status.wanted), status.local_prefill) == ({"prefill": 0, "decode": 2}, True)
        async with Client(gateway.address, admin=gateway.admin_address) as client:
            async with asyncio.timeout(10):
                while dict((status := await client.status()).wanted) != {"prefill": 0, "decode": 2}:
                    await asyncio.sleep(0.05)
            assert status.local_prefill


async def test_ending_all_workers_tells_of_each(ray: FakeRay) -> None:
    async with supervised(ray) as first:
        await until(lambda: len(there(first)) == 2)
    steps = list[str]()

    @contextmanager
    def step(name: str) -> Iterator[Callable[[str], None]]:
        yield lambda activity: None
        steps.append(name)

    config = ClusterConfig(cluster_id="test", tls="off")
    ending = SupervisorServer(config, ray)
    assert sorted(await ending.end_workers(5, step)) == ["decode-0", "prefill-0"]
    await ending.stop()
    assert (steps[0], sorted(steps[1:])) == ("ray", ["end decode-0", "end prefill-0"])


async def test_scaling_asks_for_room_and_gives_it_back_once_a_worker_is_drained(ray: FakeRay) -> None:
    async with supervised(ray) as running:
        await until(lambda: len(there(running)) == 2)
        done = await running.operations.scale(None, 3, 5)
        assert (list(done.started), done.asked_for) == (["decode-1", "decode-2"], True)
        await until(lambda: ray.requests[-1] == {"prefill": 1, "decode": 3})
        await until(lambda: len(running.fleet.table.routing.decode) == 3)
        held = {"decode-0": (0, 50), "decode-1": (2, 0), "decode-2": (0, 60)}  # requests, pages
        for name, (requests, pages) in held.items():
            worker = ray.actors[name].worker
            worker.report.running_requests = requests
            worker.report.pages.CopyFrom(PageCounts(total=100, free=100 - pages, cached=pages))
        reports = running.fleet.statuses
        await until(lambda: {one.worker_id: one.pages.cached for one in reports()}["decode-2"] == 60)
        done = await running.operations.scale(None, 1, 5)
        assert list(done.drained) == ["decode-0", "decode-2"], "the cheapest to lose"
        assert ray.actors["decode-0"].drained and ray.actors["decode-0"].died.is_set()
        await until(lambda: ray.requests[-1] == {"prefill": 1, "decode": 1})
        assert (await running.operations.scale(None, 2, 5)).started == ["decode-0"]


async def test_what_never_was_placed_is_given_up_first(ray: FakeRay) -> None:
    ray.room["decode"] = 1
    async with supervised(ray, decode=3) as running:
        await until(lambda: len(there(running)) == 2)
        done = await running.operations.scale(None, 1, 5)
        assert list(done.drained) == ["decode-2", "decode-1"]
        assert there(running).keys() == {"prefill-0", "decode-0"}


async def test_the_last_of_a_role_is_drained_by_scaling_to_none_alone(ray: FakeRay) -> None:
    async with supervised(ray) as running:
        await until(lambda: len(there(running)) == 2 and len(running.fleet.statuses()) == 2)
        await until(lambda: all(report.worker_id in there(running) for report in running.fleet.statuses()))
        with pytest.raises(Incompatible, match="to have none: isthmus scale decode=0"):
            await running.operations.drain("decode-0", 1)
        assert list((await running.operations.scale(None, 0, 5)).drained) == ["decode-0"]
        await until(lambda: ray.requests[-1] == {"prefill": 1, "decode": 0})


async def test_a_request_that_waits_starts_a_pool_of_none(ray: FakeRay) -> None:
    async with supervised(ray, decode=0) as running, following(running.address) as gateway:
        await until(lambda: len(gateway.fleet.table.routing.prefill) == 1)
        assert ray.launched == ["prefill-0"]
        async with Client(gateway.address) as client:
            assert (await client.answer(build_request(prompt="x"), timeout_s=10)).text == "hello"
        assert ray.launched == ["prefill-0", "decode-0"]


async def test_where_nobody_shall_wait_a_cold_pool_is_told_with_a_hint(ray: FakeRay) -> None:
    settings = {"wait_for_scale": False, "restart_wait_s": 7}
    async with supervised(ray, decode=0) as running, following(running.address, **settings) as gateway:
        await until(lambda: len(gateway.fleet.table.routing.prefill) == 1)
        with pytest.raises(Unavailable, match="no decode worker is there; one is asked for") as raised:
            await gateway.generator.resolve(build_request(prompt="x"))
        assert raised.value.retry_after_s == 7
        await until(lambda: len(gateway.fleet.table.routing.decode) == 1)
        await gateway.generator.resolve(build_request(prompt="x"))


async def test_a_gateway_keeps_the_list_while_the_supervisor_is_away(ray: FakeRay) -> None:
    async with supervised(ray) as first:
        port = first.address
        async with following(port) as gateway, following(port) as other:
            for one in (gateway, other):
                await until(lambda one=one: len(one.fleet.table.routing.decode) == 1)
            await until(lambda: gateway.fleet.table.gateways == 2)
            await first.stop()
            await asyncio.sleep(0.5)
            async with Client(gateway.address, admin=gateway.admin_address) as client:
                assert (await client.answer(build_request(prompt="x"), timeout_s=10)).text == "hello"
                status = await client.status()
                assert status.supervisor.startswith(f"{port}, away for ")
                assert len(status.workers) == 2


async def test_orders_at_a_gateway_are_for_its_supervisor(ray: FakeRay) -> None:
    async with supervised(ray) as running, following(running.address) as gateway:
        await until(lambda: len(gateway.fleet.table.routing.decode) == 1)
        told = f"the supervisor at {running.address}: give the order there"
        for order in (
            gateway.operations.drain("decode-0"),
            gateway.operations.flip("decode-0", WORKER_ROLE_PREFILL),
            gateway.operations.scale(2, None),
        ):
            with pytest.raises(Incompatible, match=told):
                await order


async def test_a_worker_of_another_protocol_is_listed_and_said_to_be_incompatible(ray: FakeRay) -> None:
    """Two versions meet in one Ray while it is upgraded."""
    async with supervised(ray, decode=2) as running, following(running.address) as gateway:
        await until(lambda: len(gateway.fleet.table.routing.decode) == 2)
        ray.actors["decode-1"].worker.report.protocol_version += 1
        await until(lambda: len(gateway.fleet.table.routing.decode) == 1)
        for fleet, by in ((running.fleet, "the supervisor"), (gateway.fleet, "the gateway")):
            await until(lambda fleet=fleet: any(one.reason for one in fleet.statuses()))
            worker = next(one for one in fleet.statuses() if one.reason)
            assert (worker.worker_id, worker.health) == ("decode-1", WORKER_HEALTH_INCOMPATIBLE)
            assert f"{by} speaks" in worker.reason


async def test_it_waits_for_ray_and_ends_with_its_head(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cluster.launch.detached.server.JOIN_PAUSE_S", 0.01)
    ray.missing = 3
    async with supervised(ray) as running:
        await until(lambda: len(there(running)) == 2)
        ray.head_died.set()
        async with asyncio.timeout(5):
            await running.lost.wait()


async def test_all_workers_are_ended_for_good(ray: FakeRay) -> None:
    async with supervised(ray, decode=2) as running:
        await until(lambda: len(there(running)) == 3)
    other = SupervisorServer(ClusterConfig(cluster_id="test", tls="off"), ray)
    assert sorted(await other.end_workers(5)) == ["decode-0", "decode-1", "prefill-0"]
    await other.stop()
    assert all(actor.drained and actor.died.is_set() for actor in ray.actors.values())
    assert ray.requests[-1] == {}


async def test_kubelets_probe_a_port_of_their_own(ray: FakeRay) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = ClusterConfig(cluster_id="test", tls="off", supervisor={"listen": "127.0.0.1:0", "health_listen": address})  # pyright: ignore
    running = SupervisorServer(config, ray)
    await running.start()
    async with grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "isthmus.v1.Supervisor", "liveness"):
            found = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert found.status == health_pb2.HealthCheckResponse.SERVING
    await running.stop()


async def test_the_supervisor_explains_no_request(ray: FakeRay) -> None:
    from isthmus.cluster.launch.detached.server import _explain

    with pytest.raises(IllegalState, match="ask a gateway"):
        await _explain(build_request(prompt="x"))


def test_what_is_wanted_is_read_as_it_was_written() -> None:
    wanted = Desired(configured={"prefill": 1, "decode": 2}, workers={"decode-7": Wanted("prefill", "a:1")})
    assert Desired.from_json(wanted.to_json()) == wanted
    assert Desired.from_json(b'{"version": 2, "workers": 3}') is None


async def test_gateways_share_what_runs_beyond_the_capacity() -> None:
    async with scripted_cluster(says("x"), overcommit=3) as cluster:
        queue, table = cluster.gateway.generator._admission, cluster.gateway.fleet.table
        tokens = []
        for gateways in (1, 2, 3, 10):
            table.gateways = gateways
            tokens.append(queue._capacity() / 6400)
        assert tokens == [3, 1.5, 1, 1]
