"""Workers of this host that are drained through their sockets."""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc.aio
import pytest
from support import raw_grpc

from isthmus.cluster.launch import local_drain, local_orders
from isthmus.cluster.launch.local_drain import DrainedHere, drain_here
from isthmus.cluster.launch.local_orders import LocalOrders, runtime_folder, sockets
from isthmus.cluster.launch.progress import StartProgress
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.rpc.addresses import is_own
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


async def drained(timeout_s: float, ray: str | None = None) -> DrainedHere:
    return await drain_here(timeout_s, ray, StartProgress(lambda line: None))


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


async def test_all_workers_are_drained_and_gone() -> None:
    hosts = [Host(), Host(), Host(starting=True)]
    tasks = [asyncio.create_task(host.run()) for host in hosts]
    await until(lambda: len(list(sockets())) == 3)
    done = await drained(7.0)
    assert (done.workers, done.finished, done.handed_over, done.problems) == (3, 4, 2, ())
    await asyncio.gather(*tasks)
    assert [host.drains for host in hosts] == [[7.0], [7.0], []]
    assert list(sockets()) == []
    assert (await drained(7.0)).workers == 0


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
    with pytest.raises(InvalidRequest, match="mode 0700; ISTHMUS_RUNTIME names another folder"):
        runtime_folder()


def test_a_link_is_no_folder_and_a_new_one_is_closed(tmp_path: Path) -> None:
    assert runtime_folder().stat().st_mode & 0o777 == 0o700
    (tmp_path / "run").rename(tmp_path / "other")
    (tmp_path / "run").symlink_to(tmp_path / "other")
    with pytest.raises(InvalidRequest):
        runtime_folder()


@pytest.mark.parametrize("folder", ["/proc/none/run", "/tmp/" + "x" * 90])
def test_a_folder_that_cannot_hold_sockets_is_told_in_one_line(
    folder: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("ISTHMUS_RUNTIME", folder)
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    with pytest.raises(InvalidRequest, match=r"cannot be made|of more than") as raised:
        runtime_folder()
    assert "Errno" not in str(raised.value) and "ISTHMUS_RUNTIME names another folder" in str(raised.value)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for that of a socket: 107 bytes for both."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


async def test_workers_of_a_service_are_found_from_a_login(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service has no XDG_RUNTIME_DIR; one of another user, as su leaves it, is not used."""
    monkeypatch.delenv("ISTHMUS_RUNTIME")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(short / "tmp"))
    (short / "tmp").mkdir()
    (short / "login").mkdir()
    host = Host()
    task = asyncio.create_task(host.run())
    service = short / "tmp" / f"isthmus-{os.getuid()}"
    await until(lambda: service.is_dir() and list(service.glob("*.sock")))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "login"))
    assert runtime_folder() == short / "login" / "isthmus"
    assert next(service.glob("*.sock")) in list(sockets())
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert local_orders._folders()[0] == short / "tmp" / "isthmus-12345"
    monkeypatch.undo()
    host.left()
    await task


async def test_a_ray_that_has_no_node_here_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await drained(1.0, "127.0.0.1:1")).problems == ()
    nodes = [local_drain._Raylet(os.getppid(), "mine", "10.0.0.1:6379"), local_drain._Raylet(1, "other", "127.0.0.1:1")]
    closed = list[str]()

    def fails(nodes: list[local_drain._Raylet], deadline_s: float) -> None:
        closed.extend(node.node for node in nodes)
        raise RuntimeError("no head there. Note: RAY_AUTH_MODE is something")

    monkeypatch.setattr(local_drain, "_close", fails)
    monkeypatch.setattr(local_drain, "_raylets", lambda: nodes)
    host = Host()
    task = asyncio.create_task(host.run())
    await until(lambda: list(sockets()))
    done = await drained(1.0)
    assert closed == ["mine"], "the raylet that has started a worker is found without its Ray being named"
    assert (done.workers, done.problems) == (1, ("the Ray node could not be closed: no head there",))
    await task
    await drained(1.0, "127.0.0.1:1")
    assert closed == ["mine", "other"]


def test_the_raylet_of_isthmus_up_is_not_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["/x/raylet", "--node_ip_address=127.0.0.1", "--gcs-address=127.0.0.1:6379"]
    for pid, words in enumerate(([*common, "--node_id=a", '--labels={"isthmus-up":"own"}'], [*common, "--node_id=b"])):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes("\0".join(words).encode())
    monkeypatch.setattr(local_drain, "PROCESSES", tmp_path)
    assert [node.node for node in local_drain._raylets()] == ["b"]


def test_addresses_of_this_host() -> None:
    assert is_own("127.0.0.1")
    assert not is_own("203.0.113.7") and not is_own("0.0.0.0") and not is_own("localhost")
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


async def test_a_path_that_is_no_text_ends_no_socket() -> None:
    """It ends the loop by which grpc.aio takes calls, as of any server: this listens anew."""
    host = Host()
    task = asyncio.create_task(host.run())
    await until(lambda: list(sockets()))
    path = next(sockets())
    for _ in range(3):
        reader, writer = await asyncio.open_unix_connection(str(path))
        head = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"\xff\xfe"), (b":authority", b"x"))
        block = b"".join(raw_grpc.literal(*pair) for pair in (*head, (b"content-type", b"application/grpc")))
        ends = raw_grpc.END_HEADERS | raw_grpc.END_STREAM
        writer.write(raw_grpc.opening() + raw_grpc.frame(raw_grpc.HEADERS, ends, 1, block))
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read()
        writer.close()
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            call = WorkerStub(channel).GetReport(GetReportRequest(), timeout=5, wait_for_ready=True)
            assert (await call).worker_id == "w"
    assert (await drained(5.0)).workers == 1
    await task
