"""Which workers are checked with whom."""

from routing_tables import report

from isthmus.cluster.fleet.canary_schedule import CanarySchedule
from isthmus.cluster.fleet.worker_table import Member


def member(address: str, instance: str = "one.1") -> Member:
    return Member(address, report(address, instance=instance))


def pairs(found: list[tuple[Member, Member]]) -> list[tuple[str, str]]:
    return [(prefill.address, decode.address) for prefill, decode in found]


def test_new_workers_are_paired_with_verified_ones_and_each_other() -> None:
    schedule, p0, p1, d0, d1 = CanarySchedule(), member("p0"), member("p1"), member("d0"), member("d1")
    assert pairs(schedule.due([d0, p0, d1], [], (), 0.0)) == [("p0", "d0")]
    assert pairs(schedule.due([d0, d1], [p0], (), 0.0)) == [("p0", "d0"), ("p0", "d1")]
    assert pairs(schedule.due([d0, d1], [p0], ["d0"], 0.0)) == [("p0", "d1")]
    assert schedule.due([d0, d1], [], (), 0.0) == schedule.due([], [p0, p1, d0], (), 0.0) == []
    assert schedule.due([d0], [Member("p2", report("p2", page_tokens=32))], (), 0.0) == []


def test_one_that_failed_is_tried_later_with_another_partner() -> None:
    schedule, p0, p1, d0 = CanarySchedule(), member("p0"), member("p1"), member("d0")
    assert schedule.record_failure(d0, p0, 0.0) == 1
    assert schedule.due([d0], [p0, p1], (), 0.5) == []
    assert pairs(schedule.due([d0], [p0, p1], (), 1.0)) == [("p1", "d0")]
    assert schedule.record_failure(d0, p1, 1.0) == 2
    assert schedule.due([d0], [p0, p1], (), 2.5) == []
    assert pairs(schedule.due([d0], [p0, p1], (), 3.0)) == [("p0", "d0")]


def test_nothing_is_remembered_of_another_instance() -> None:
    schedule, p0 = CanarySchedule(), member("p0")
    schedule.record_failure(member("d0"), p0, 0.0)
    again = member("d0", "two.1")
    assert pairs(schedule.due([again], [p0], (), 0.0)) == [("p0", "d0")]
    assert schedule.record_failure(again, p0, 0.0) == 1
