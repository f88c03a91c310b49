"""What Ray is asked for; no Ray is started."""

import inspect
import os
from typing import Any

import pytest
import ray
import ray.util

from isthmus.cluster.config import ClusterConfig
from isthmus.cluster.launch import ray_cluster
from isthmus.cluster.launch.detached import ray_pool
from isthmus.cluster.launch.detached.ray_pool import RayPool
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
    monkeypatch.setattr("os.environ", {})
    WorkerActor("prefill", {"listen": listen, "threads": 3, "a": 1}, {"listen": listen, "b": 2})
    both = {"listen": bound, "threads": 3}
    assert given == [({**both, "a": 1}, {**both, "b": 2})]
    assert os.environ["OMP_NUM_THREADS"] == "3"


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


@pytest.mark.parametrize(
    ("have", "settings", "asked"),
    [
        ({"CPU": 4}, {}, {}),
        ({"prefill": 2}, {}, {"prefill": 1}),
        ({"prefill": 2, "GPU": 2}, {}, {"prefill": 1, "GPU": 1}),
        ({"prefill": 2, "GPU": 2}, {"device": "cpu"}, {"prefill": 1}),
        ({}, {"worker_port": 50061}, {"prefill": 1}),
        ({}, {"worker_port": 50061, "prefill_gpus": 4}, {"prefill": 1, "GPU": 4}),
        ({"GPU": 8}, {"prefill_gpus": 0}, {}),
    ],
)
async def test_a_detached_worker_asks_for_its_role_and_gpus(
    have: dict[str, float], settings: dict[str, Any], asked: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[Any] = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    monkeypatch.setattr(ray_pool, "_request", requested.append)
    pool = RayPool(ClusterConfig(cluster_id="mine", **settings))
    await pool.request({"prefill": 2, "decode": 0})
    assert pool.bundle("prefill") == asked
    assert requested == [[asked] * 2 if asked else []]
    options = pool._actor_options("prefill", "prefill-0")
    assert (options["name"], options["lifetime"], options["num_cpus"]) == ("prefill-0.mine", "detached", 0)
    assert pool._worker_port == settings.get("worker_port", 0)
