"""Starting, following and stopping workers, with a launcher of scripted workers instead of Ray."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from scripted import Scripted, client_of, report_of, says, served

from isthmus.cluster.client.client import build_request
from isthmus.cluster.config import ClusterConfig, Role
from isthmus.cluster.launch import supervisor as supervisor_module
from isthmus.cluster.launch import worker_group
from isthmus.cluster.launch.supervisor import Supervisor
from isthmus.proto.errors import Incompatible, NotFound, Unavailable
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL
from isthmus.worker.service import Drained


@dataclass
class FakeWorker:
    """A worker whose process can be made to die, once."""

    name: str
    role: Role
    worker: Scripted
    drained: bool = False
    ended: bool = False
    died: asyncio.Event = field(default_factory=asyncio.Event)
    starting: Exception | None = None
    start_task: asyncio.Task[None] | None = None

    async def address(self) -> str:
        if self.starting is not None:
            raise self.starting
        if self.worker.server is None:
            self.start_task = asyncio.create_task(self.worker.start())
            await asyncio.shield(self.start_task)  # as elsewhere: who waits may go, the worker starts all the same
        return self.worker.address

    async def activity(self) -> str:
        return "reading weights"

    async def wait_closed(self) -> None:
        await self.died.wait()

    async def die(self) -> None:
        await self.worker.stop()
        self.worker.server = None
        self.starting = Unavailable("died")
        self.died.set()

    async def drain(self, timeout_s: float) -> Drained:
        self.drained = True
        return Drained(finished=2, handed_over=1)

    async def stop(self) -> None:
        self.ended = True
        if self.worker.server is not None:
            await self.worker.stop()
            self.worker.server = None


@dataclass
class FakeLauncher:
    """Where fake workers come from."""

    workers: list[FakeWorker] = field(default_factory=list)
    failing: str = ""
    broken: int = 0  # launches that fail
    closed: bool = False
    starts: int = 0
    head_died: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        self.starts += 1
        self.closed = False
        self.head_died.clear()

    async def lost(self) -> None:
        await self.head_died.wait()

    async def launch(self, role: Role, name: str) -> FakeWorker:
        kind = WORKER_ROLE_PREFILL if role == "prefill" else WORKER_ROLE_DECODE
        if self.broken:
            self.broken -= 1
            raise Unavailable("no room")
        worker = FakeWorker(name, role, Scripted(report_of(kind, worker_id=name), says("hello")))
        if name == self.failing:
            worker.starting = NotFound("no such model")
        self.workers.append(worker)
        return worker

    async def close(self) -> None:
        self.closed = True
        for worker in self.workers:
            if worker.start_task is not None:
                await worker.start_task
            if worker.worker.server is not None:
                await worker.worker.stop()


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "load_served_model", lambda *_: served())


async def test_up_answer_and_down() -> None:
    launcher = FakeLauncher()
    config = ClusterConfig(prefill=2, decode=2, port=0, tls="off")
    supervisor = Supervisor(config, launcher)
    gateway = await supervisor.start()
    assert [worker.name for worker in launcher.workers] == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    async with client_of(gateway) as client:
        assert (await client.answer(build_request(prompt="x"))).text == "hello"
        assert (await client.status()).cluster_id == config.cluster_id
    await supervisor.stop(5)
    assert launcher.closed
    assert all(worker.drained for worker in launcher.workers)


async def test_a_worker_that_cannot_start_is_told_at_once() -> None:
    launcher = FakeLauncher(failing="decode-0")
    supervisor = Supervisor(ClusterConfig(port=0, tls="off"), launcher)
    with pytest.raises(NotFound, match="no such model"):
        await supervisor.start()
    await supervisor.stop(0)
    assert launcher.closed


async def test_a_worker_that_died_is_found_at_its_new_address() -> None:
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(port=0, tls="off"), launcher)
    gateway = await supervisor.start()
    decode = launcher.workers[1]
    before = decode.worker.address
    await decode.die()
    async with asyncio.timeout(10):
        while [status.address for status in gateway.fleet.statuses()][1:] in ([before], []):
            await asyncio.sleep(0.02)
        while not gateway.fleet.table.routing.decode:
            await gateway.fleet.change.wait()
    assert len(gateway.fleet.statuses()) == 2
    async with client_of(gateway) as client:
        assert (await client.answer(build_request(prompt="x"))).text == "hello"
    await supervisor.stop(0)


async def test_without_its_head_the_cluster_goes_on_and_is_built_anew_once_a_worker_is_lost() -> None:
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(port=0, tls="off"), launcher)
    gateway = await supervisor.start()
    first = list(launcher.workers)
    launcher.head_died.set()
    async with client_of(gateway) as client:
        assert (await client.answer(build_request(prompt="x"))).text == "hello"
        with pytest.raises(Unavailable, match="head is gone"):
            await gateway.operations.scale(2, None, 5)
        assert (launcher.starts, launcher.workers) == (1, first)
        await first[1].die()
        asked = asyncio.create_task(client.answer(build_request(prompt="x"), timeout_s=30))
        async with asyncio.timeout(20):
            assert (await asked).text == "hello", "it waited for the new workers"
    assert launcher.starts == 2
    assert [worker.name for worker in launcher.workers[2:]] == ["prefill-0", "decode-0"]
    assert names(supervisor) == ["prefill-0", "decode-0"]
    assert len((await gateway.operations.scale(2, None, 5)).started) == 1
    await supervisor.stop(0)


async def test_a_worker_that_ends_again_and_again_is_started_after_growing_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_group, "RESTART_PAUSE_S", 0.02)
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(port=0, tls="off"), launcher)
    gateway = await supervisor.start()
    reasons = set[str]()
    for ends in range(6):  # more than any fixed number of lives was
        launched = len(launcher.workers)
        launcher.broken = int(ends == 3)  # a start that fails counts as an end
        await launcher.workers[-1 if ends else 1].die()
        reasons.clear()
        async with asyncio.timeout(20):
            while True:
                now = {status.reason for status in gateway.fleet.statuses() if status.reason}
                if len(launcher.workers) > launched and not now:
                    break
                reasons |= now
                await asyncio.sleep(0.005)
        times = "once" if ends == 0 else f"{ends + 1 + (ends >= 3)} times"
        assert any(f"ended {times}; " in reason for reason in reasons), reasons
    assert any("ended 7 times; next start in 1 s" in reason for reason in reasons), reasons
    assert names(supervisor) == ["prefill-0", "decode-0"]
    await supervisor.stop(0)


async def test_a_worker_that_is_being_started_anew_can_be_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(decode=2, port=0, tls="off"), launcher)
    gateway = await supervisor.start()
    gate, launch = asyncio.Event(), launcher.launch

    async def slow(role: Role, name: str) -> FakeWorker:
        gate.set()
        await asyncio.sleep(0.2)
        return await launch(role, name)

    monkeypatch.setattr(launcher, "launch", slow)
    await launcher.workers[2].die()
    async with asyncio.timeout(10):
        await gate.wait()
        await gateway.operations.drain("decode-1", 1)
        while not launcher.workers[-1].ended or len(launcher.workers) < 4:
            await asyncio.sleep(0.02)
    assert names(supervisor) == ["prefill-0", "decode-0"]
    await supervisor.stop(0)


def names(supervisor: Supervisor) -> list[str]:
    assert supervisor.gateway is not None
    return [status.worker_id for status in supervisor.gateway.fleet.statuses()]


async def test_scaling_starts_what_is_missing_and_drains_what_is_too_much() -> None:
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(port=0, tls="off"), launcher)
    gateway = await supervisor.start()
    done = await gateway.operations.scale(3, 2, 5)
    assert (sorted(done.started), list(done.drained)) == (["decode-1", "prefill-1", "prefill-2"], [])
    async with asyncio.timeout(10):
        while len(gateway.fleet.table.routing.prefill) < 3 or len(gateway.fleet.table.routing.decode) < 2:
            await gateway.fleet.change.wait()
    done = await gateway.operations.scale(1, None, 5)
    assert (list(done.started), sorted(done.drained)) == ([], ["prefill-1", "prefill-2"])
    assert names(supervisor) == ["prefill-0", "decode-0", "decode-1"]
    gone = [worker for worker in launcher.workers if worker.name in done.drained]
    assert all(worker.drained and worker.ended for worker in gone)
    assert not (await gateway.operations.scale(1, 2, 5)).started
    with pytest.raises(Incompatible, match="one worker of each role"):
        await gateway.operations.scale(0, None, 5)
    await supervisor.stop(0)


async def test_a_worker_that_cannot_be_added_leaves_nothing() -> None:
    launcher = FakeLauncher(failing="decode-1")
    supervisor = Supervisor(ClusterConfig(port=0, tls="off"), launcher)
    gateway = await supervisor.start()
    with pytest.raises(NotFound, match="no such model"):
        await gateway.operations.scale(None, 2, 5)
    assert names(supervisor) == ["prefill-0", "decode-0"]
    assert launcher.workers[-1].ended
    await supervisor.stop(0)


async def test_a_drained_worker_is_ended_and_does_not_come_back() -> None:
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(decode=2, port=0, tls="off"), launcher)
    gateway = await supervisor.start()
    done = await gateway.operations.drain("decode-0", 1)
    assert (done.finished, done.handed_over) == (2, 1)
    assert names(supervisor) == ["prefill-0", "decode-1"]
    with pytest.raises(Incompatible, match="only decode worker"):
        await gateway.operations.drain("decode-1", 1)
    with pytest.raises(NotFound, match="no worker 'decode-0'; there are: prefill-0, decode-1"):
        await gateway.operations.drain("decode-0", 1)
    await supervisor.stop(0)


async def test_a_flipped_worker_that_died_comes_back_in_its_new_role() -> None:
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(decode=2, port=0, tls="off"), launcher)
    gateway = await supervisor.start()
    decode = launcher.workers[2]
    assert supervisor.workers is not None
    supervisor.workers.set_role(decode.worker.address, WORKER_ROLE_PREFILL)
    await decode.die()
    async with asyncio.timeout(10):
        while len(launcher.workers) < 4:
            await asyncio.sleep(0.02)
    assert (launcher.workers[3].name, launcher.workers[3].role) == ("decode-1", "prefill")
    assert gateway.operations.manager is supervisor.workers
    await supervisor.stop(0)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


def raise_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Has a method raise what it should not, at its first call."""
    genuine, left = getattr(owner, name), [ValueError("boom")]

    async def raising(*args: Any) -> Any:
        if left:
            raise left.pop()
        return await genuine(*args)

    monkeypatch.setattr(owner, name, raising)


@pytest.mark.parametrize("method", ["wait_closed", "stop"])
async def test_the_follower_of_a_worker_goes_on_after_an_exception(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    raise_once(monkeypatch, FakeWorker, method)
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(port=0, tls="off"), launcher)
    try:
        gateway = await supervisor.start()
        decode = launcher.workers[1]
        before = decode.worker.address
        await until(lambda: method == "stop" or gateway.failures)
        await asyncio.sleep(0.2)  # it follows again
        await decode.die()
        await until(lambda: [status.address for status in gateway.fleet.statuses()][1:] not in ([before], []))
        await until(lambda: len(gateway.fleet.statuses()) == 2 and len(gateway.fleet.table.routing.decode) == 1)
        assert gateway.failures == {"follow a worker": 1}
    finally:
        await supervisor.stop(0)


async def test_the_guard_of_the_launcher_goes_on_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "REBUILD_DRAIN_S", 0.1)
    raise_once(monkeypatch, FakeLauncher, "lost")
    launcher = FakeLauncher()
    supervisor = Supervisor(ClusterConfig(port=0, tls="off"), launcher)
    try:
        gateway = await supervisor.start()
        await until(lambda: gateway.failures == {"guard the launcher": 1})
        launcher.head_died.set()
        await launcher.workers[1].die()
        await until(lambda: launcher.starts == 2)
    finally:
        await supervisor.stop(0)
