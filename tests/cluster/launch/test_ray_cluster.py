"""What Ray is asked for; no Ray is started."""

import inspect
from typing import Any

import pytest
import ray
import ray.util

from isthmus.cluster.config import ClusterConfig
from isthmus.cluster.launch import ray_cluster
from isthmus.cluster.launch.ray_cluster import RayCluster, WorkerActor
from isthmus.cluster.launch.worker_thread import WorkerThread
from isthmus.proto.errors import AlreadyExists


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of actors on a Ray that refuses a name that is taken, as the real one does."""
    names: set[str] = set()

    class Remote:
        def options(self, *, name: str, **_: Any) -> "Remote":
            if name in names:
                raise ValueError(f"The name {name} (namespace=isthmus) is already taken.")
            names.add(name)
            return self

        def remote(self, *_: Any) -> object:
            return object()

    monkeypatch.setattr(ray, "remote", lambda _: Remote())
    return names


async def test_clusters_that_share_a_ray_have_names_of_their_own(taken: set[str]) -> None:
    """Also where their processes have the same id, as in two containers."""
    for _ in range(2):
        cluster = RayCluster(ClusterConfig(address="auto"))
        for name in ("prefill-0", "decode-0"):
            assert (await cluster.launch("prefill", name)).name == name
    assert len(taken) == 4
    assert len({name.partition(".")[2] for name in taken}) == 2
    given = RayCluster(ClusterConfig(address="auto", cluster_id="mine"))
    await given.launch("decode", "decode-0")
    assert "decode-0.mine" in taken
    with pytest.raises(AlreadyExists, match="another cluster there with the id mine"):
        await given.launch("decode", "decode-0")


def test_a_cluster_id_is_short_and_drawn_at_each_start() -> None:
    drawn = {ClusterConfig().cluster_id for _ in range(50)}
    assert len(drawn) == 50
    assert {len(one) for one in drawn} == {8}
    for bad in ("", "A", "a.b", "a" * 33):
        with pytest.raises(ValueError, match="cluster_id"):
            ClusterConfig(cluster_id=bad)


@pytest.mark.parametrize(
    ("listen", "node", "bound"),
    [
        ("0.0.0.0:0", "10.0.0.5", "10.0.0.5:0"),
        ("0.0.0.0:0", "fd00::5", "[fd00::5]:0"),
        ("127.0.0.1:0", "x", "127.0.0.1:0"),
    ],
)
def test_actors_listen_on_the_address_of_their_node(
    listen: str, node: str, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    monkeypatch.setattr(WorkerThread, "__init__", lambda self, role, settings, other: given.append((settings, other)))
    WorkerActor("prefill", {"listen": listen, "a": 1}, {"listen": listen, "b": 2})
    assert given == [({"listen": bound, "a": 1}, {"listen": bound, "b": 2})]


def test_actors_have_no_coroutines() -> None:
    """One would have Ray run all methods in one event loop, where `wait_closed` would keep out every other call."""
    assert inspect.getmembers(WorkerActor, inspect.iscoroutinefunction) == []


async def test_the_head_of_ray_is_dialled_over_ipv6_too(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[tuple[str, int]] = []

    async def refused(host: str, port: int) -> None:
        dialled.append((host, port))
        raise OSError

    monkeypatch.setattr("asyncio.open_connection", refused)
    monkeypatch.setattr(ray_cluster, "HEAD_POLL_S", 0.001)
    cluster = RayCluster(ClusterConfig())
    cluster._head = "[fd00::1]:6379"
    await cluster.lost()
    assert dialled == [("fd00::1", 6379)] * ray_cluster.HEAD_MISSES
