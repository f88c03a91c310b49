"""The table of workers in virtual time: fed with reports, routed on, and nothing else runs."""

from typing import Any

import pytest
from routing_tables import demand, report

from isthmus.cluster.fleet.compatibility import Requirements
from isthmus.cluster.fleet.report import Health
from isthmus.cluster.fleet.worker_table import OUT_S, SUSPECT_S, WorkerTable
from isthmus.cluster.router.router import Placement, route
from isthmus.proto.errors import Unavailable

REQUIRED = Requirements(protocol_version=1, model="m", fingerprint="f")


def table_of(*addresses: str, now_s: float = 0.0, verify: bool = False) -> WorkerTable:
    table = WorkerTable(REQUIRED, verify=verify)
    for address in addresses:
        table.add(address, now_s)
        table.report(address, report(address), now_s)
    return table


def place(table: WorkerTable, now_s: float, **changes: Any) -> Placement:
    asked = demand(**changes)
    placement = route(asked, table.routing)
    table.place(asked, placement, now_s)
    return placement


def test_a_placement_counts_until_a_report_shows_it() -> None:
    table = table_of("p0", "p1", "d0")
    first = place(table, 0.0)
    second = place(table, 0.01)
    assert {first.prefill[0], second.prefill[0]} == {"p0", "p1"}
    row = table.routing.prefill.row_of[first.prefill[0]]
    assert table.routing.prefill.queued[row] == 1000
    for address in ("p0", "p1"):
        table.report(address, report(address, waiting_tokens=400), 0.1)  # older than the placements
    assert table.routing.prefill.queued[row] == 1400
    table.report(first.prefill[0], report(first.prefill[0], waiting_tokens=900), 1.0)
    assert table.routing.prefill.queued[row] == 900


def test_a_silent_worker_is_a_suspect_and_then_out() -> None:
    table = table_of("p0", "d0", "d1")
    quiet_s = SUSPECT_S + 0.1
    table.report("d1", report("d1"), quiet_s)
    table.report("p0", report("p0"), quiet_s)
    assert table.check_silence(quiet_s) == []
    assert {load.address: load.suspect for load in table.routing.decode} == {"d0": True, "d1": False}
    assert table.health("d0", quiet_s) == (None, "gets no new work: it failed, lags behind or reports late")
    assert place(table, quiet_s).decode == "d1"
    assert table.check_silence(OUT_S + 0.1) == ["d0"]
    version = table.version
    assert table.mark_lost("d0", "no report", OUT_S + 0.1)
    assert not table.mark_lost("d0", "no report", OUT_S + 0.2)
    assert (table.version, table.health("d0", OUT_S)) == (version + 1, (Health.UNREACHABLE, "no report"))
    assert [load.address for load in table.routing.decode] == ["d1"]
    incarnation = table.incarnation("d0")
    table.report("d0", report("d0"), 5.0)
    assert len(table.routing.decode) == 2
    assert table.incarnation("d0") == incarnation + 1


def test_time_in_which_no_report_could_be_heard_is_nobodys_silence() -> None:
    table = table_of("p0", "d0")
    assert table.check_silence(OUT_S + 1.0, stalled_s=OUT_S) == []
    assert table.check_silence(OUT_S + 1.0) == []
    assert table.check_silence(2 * OUT_S + 1.0) == ["p0", "d0"]


def test_a_worker_that_fails_is_ejected_and_probed_later() -> None:
    table = table_of("p0", "d0", "d1")
    for _ in range(3):
        table.failed("d0", 1.0)
    assert table.is_ejected("d0", 1.0)
    assert {place(table, 1.0, affinity=n).decode for n in range(8)} == {"d1"}
    assert not table.is_ejected("d0", 100.0)
    for address in ("p0", "d0", "d1"):
        table.report(address, report(address), 100.0)
    table.check_silence(100.0)
    table.served("d0", 100.0)
    assert {place(table, 100.0, affinity=n).decode for n in range(8)} == {"d0", "d1"}


def test_no_worker_takes_work_before_it_is_verified() -> None:
    table = table_of("p0", "d0", verify=True)
    assert table.health("d0", 0.0)[0] is Health.CHECKING
    with pytest.raises(Unavailable):
        place(table, 0.0)
    unverified, verified = table.to_verify()
    assert ([worker.address for worker in unverified], verified) == (["p0", "d0"], [])
    for worker in unverified:
        table.judge(worker, None, 1.0)
    assert place(table, 1.0).decode == "d0"
    assert table.usable_s == 1.0
    table.report("d0", report("d0", instance="one.2", role="prefill"), 2.0)
    assert table.is_flipped("d0")
    table.report("d0", report("d0", instance="two.1"), 3.0)  # another process: nothing is known of it
    assert not table.is_flipped("d0")
    table.judge(table.to_verify()[0][0], "its canary failed", 3.0)
    assert table.health("d0", 3.0) == (Health.UNFIT, "its canary failed")


def test_a_worker_that_cannot_be_paired_is_left_out_with_the_reason() -> None:
    table = table_of("p0", "d0")
    table.report("d0", report("d0", codecs={"fp8": "x"}), 1.0)
    health, reason = table.health("d0", 1.0)
    assert (health, reason) == (Health.INCOMPATIBLE, "has codecs fp8; the prefill workers have raw")
    assert not len(table.routing.decode)
    table.remove("p0", 2.0)
    assert table.health("d0", 2.0) == (None, "")
    assert table.addresses == ["d0"]


def test_addresses_of_peers_are_translated() -> None:
    table = table_of("p0:1", "d0:1")
    table.report("p0:1", report("p0", advertise="nat.example:9", instance="two.1"), 1.0)
    table.report("d0:1", report("d0", links={"nat.example:9": 5.0, "other:1": 7.0}), 1.0)
    assert table.peer_addresses(["p0:1", "gone:1"]) == ["nat.example:9", "gone:1"]
    assert table.address_of_peer("nat.example:9") == "p0:1"
    assert table.routing.decode.loads["d0:1"].links == {"p0:1": 5.0, "other:1": 7.0}
