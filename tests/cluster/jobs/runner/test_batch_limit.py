"""Batch requests fill what is idle and make room for others."""

from typing import Any

from scripted import report_of

from isthmus.cluster.jobs.runner.batch_limit import BatchLimit, ClusterLoad, load_of
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_DRAINING,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    PageCounts,
)


def cluster_load(**changes: Any) -> ClusterLoad:
    idle: dict[str, Any] = {"workers": True, "waiting": 0, "free_share": 1.0, "others": 0, "lag_s": 0.0}
    return ClusterLoad(**{**idle, **changes})


def test_an_idle_cluster_fills_up_to_the_limit() -> None:
    room = BatchLimit(4)
    assert [room.update(cluster_load()) for _ in range(5)] == [2, 3, 4, 4, 4]


def test_batch_makes_room_where_something_waits() -> None:
    for busy in ({"waiting": 1}, {"free_share": 0.2}, {"lag_s": 0.1}):
        room = BatchLimit(16)
        for _ in range(20):
            room.update(cluster_load())
        assert [room.update(cluster_load(**busy)) for _ in range(3)] == [12, 9, 6]
        assert [room.update(cluster_load(**busy)) for _ in range(20)][-1] == 1  # alone, it goes on


def test_beside_others_an_eighth_is_left_and_nothing_where_they_wait() -> None:
    room = BatchLimit(16)
    for _ in range(20):
        room.update(cluster_load())
    assert room.update(cluster_load(others=1)) == 2
    assert [room.update(cluster_load(others=1, waiting=1)) for _ in range(3)] == [1, 1, 0]
    assert room.update(cluster_load()) == 1


def test_nothing_runs_without_workers() -> None:
    assert BatchLimit(16).update(cluster_load(workers=False)) == 0


def test_what_workers_report() -> None:
    pages = PageCounts(total=100, free=20, cached=20, in_use=60)
    reports = [
        report_of(WORKER_ROLE_PREFILL, waiting_requests=2),
        report_of(WORKER_ROLE_DECODE, waiting_requests=1, pages=pages),
        report_of(WORKER_ROLE_DECODE, waiting_requests=5, health=WORKER_HEALTH_DRAINING),
    ]
    assert load_of(reports, 3, 0.5) == ClusterLoad(workers=True, waiting=3, free_share=0.4, others=3, lag_s=0.5)
    assert not load_of(reports[:1], 0, 0.0).workers
