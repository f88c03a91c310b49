"""Batch requests fill what is idle and make room for others."""

from typing import Any

from scripted import report_of

from isthmus.cluster.jobs.runner.batch_limit import BatchRoom, Seen, look
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_DRAINING,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    PageCounts,
)


def seen(**changes: Any) -> Seen:
    idle: dict[str, Any] = {"workers": True, "waiting": 0, "free_share": 1.0, "others": 0, "lag_s": 0.0}
    return Seen(**{**idle, **changes})


def test_an_idle_cluster_fills_up_to_the_limit() -> None:
    room = BatchRoom(4)
    assert [room.update(seen()) for _ in range(5)] == [2, 3, 4, 4, 4]


def test_batch_makes_room_where_something_waits() -> None:
    for busy in ({"waiting": 1}, {"free_share": 0.2}, {"lag_s": 0.1}):
        room = BatchRoom(16)
        for _ in range(20):
            room.update(seen())
        assert [room.update(seen(**busy)) for _ in range(3)] == [12, 9, 6]
        assert [room.update(seen(**busy)) for _ in range(20)][-1] == 1  # alone, it goes on


def test_beside_others_an_eighth_is_left_and_nothing_where_they_wait() -> None:
    room = BatchRoom(16)
    for _ in range(20):
        room.update(seen())
    assert room.update(seen(others=1)) == 2
    assert [room.update(seen(others=1, waiting=1)) for _ in range(3)] == [1, 1, 0]
    assert room.update(seen()) == 1


def test_nothing_runs_without_workers() -> None:
    assert BatchRoom(16).update(seen(workers=False)) == 0


def test_what_workers_report() -> None:
    pages = PageCounts(total=100, free=20, cached=20, in_use=60)
    reports = [
        report_of(WORKER_ROLE_PREFILL, waiting_requests=2),
        report_of(WORKER_ROLE_DECODE, waiting_requests=1, pages=pages),
        report_of(WORKER_ROLE_DECODE, waiting_requests=5, health=WORKER_HEALTH_DRAINING),
    ]
    assert look(reports, 3, 0.5) == Seen(workers=True, waiting=3, free_share=0.4, others=3, lag_s=0.5)
    assert not look(reports[:1], 0, 0.0).workers
