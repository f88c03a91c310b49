"""Workers of this host that are drained through their sockets."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest

from isthmus.cluster.launch import local_drain
from isthmus.cluster.launch.local_drain import drain_here
from isthmus.cluster.launch.local_orders import LocalOrders, runtime_folder, sockets
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE, GetReportRequest, WorkerReport
from isthmus.proto.worker_pb2_grpc import WorkerStub
from isthmus.worker.service import Drained, OrderServicer


class Host:
    """A worker process with one request that ends in a drain; `starting`: it serves nothing yet."""

    def __init__(self, *, starting: bool = False) -> None:
        self.drains: list[float] = []
        self.ended = asyncio.Event()
        self.local = LocalOrders(self)
        self._service = OrderServicer(lambda: WorkerReport(worker_id="w", role=WORKER_ROLE_DECODE), self._drain)
        self._service.orders = self  # pyright: ignore[reportAttributeAccessIssue]
        self.running = None if starting else self._service

    async def _drain(self, timeout_s: float) -> Drained:
        self.drains.append(timeout_s)
        return Drained(finished=2, handed_over=1)

    async def settle(self) -> None:
        pass

    def left(self) -> None:
        self.ended.set()

    async def run(self) -> None:
        await self.local.start()
        await self.ended.wait()
        await self.local.stop()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_RUNTIME", str(tmp_path / "run"))


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


async def test_all_workers_are_drained_and_gone() -> None:
    hosts = [Host(), Host(), Host(starting=True)]
    tasks = [asyncio.create_task(host.run()) for host in hosts]
    await until(lambda: len(list(sockets())) == 3)
    done = await drain_here(7.0, None)
    assert (done.workers, done.finished, done.handed_over, done.problems) == (3, 4, 2, ())
    await asyncio.gather(*tasks)
    assert [host.drains for host in hosts] == [[7.0], [7.0], []]
    assert list(sockets()) == []
    assert (await drain_here(7.0, None)).workers == 0


async def test_what_dead_workers_left_is_removed() -> None:
    host = Host()
    task = asyncio.create_task(host.run())
    await until(lambda: list(sockets()))
    left = next(sockets()).with_name("1-dead.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    assert left not in list(sockets())
    assert not left.exists()
    host.left()
    await task


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707])
def test_a_folder_that_others_may_enter_is_not_used(mode: int, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    with pytest.raises(PermissionError, match="mode 0700; name another one with ISTHMUS_RUNTIME"):
        runtime_folder()


def test_a_link_is_no_folder_and_a_new_one_is_closed(tmp_path: Path) -> None:
    assert runtime_folder().stat().st_mode & 0o777 == 0o700
    (tmp_path / "run").rename(tmp_path / "other")
    (tmp_path / "run").symlink_to(tmp_path / "other")
    with pytest.raises(PermissionError):
        runtime_folder()


async def test_a_ray_that_has_no_node_here_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(local_drain._nodes_here("127.0.0.1:1")) == []
    assert (await drain_here(1.0, "127.0.0.1:1")).problems == ()

    def fails(ray: str, deadline_s: float) -> None:
        raise RuntimeError("no head there")

    monkeypatch.setattr(local_drain, "_close_node", fails)
    host = Host()
    task = asyncio.create_task(host.run())
    await until(lambda: list(sockets()))
    done = await drain_here(1.0, "127.0.0.1:1")
    assert (done.workers, done.problems) == (1, ("the Ray node could not be closed: no head there",))
    await task


def test_addresses_of_this_host() -> None:
    assert local_drain._is_ours("127.0.0.1")
    assert not local_drain._is_ours("203.0.113.7")
    assert local_drain._same("localhost:6379", "127.0.0.1:6379")
    assert not local_drain._same("127.0.0.1:6379", "127.0.0.1:6380")


async def test_reports_come_through_the_socket_too() -> None:
    host = Host()
    task = asyncio.create_task(host.run())
    await until(lambda: list(sockets()))
    async with grpc.aio.insecure_channel(f"unix:{next(sockets())}") as channel:
        assert (await WorkerStub(channel).GetReport(GetReportRequest())).worker_id == "w"
    host.left()
    await task
