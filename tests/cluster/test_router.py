"""The router's choices, and which codecs and lengths a snapshot allows."""

from typing import Any

import pytest

from isthmus.cluster.router import Demand, Snapshot, WorkerLoad, offered_codecs, route, token_limit
from isthmus.proto.errors import InvalidRequest, Unavailable

CODECS = {"raw": "r0", "tq-k4v4": "t0"}


def load(address: str, **changes: Any) -> WorkerLoad:
    fields: dict[str, Any] = {"codecs": CODECS, "page_tokens": 64, "pages_total": 100, "pages_free": 100}
    return WorkerLoad(**{"address": address, **fields, **changes})


def demand(**changes: Any) -> Demand:
    return Demand(**{"prompt_tokens": 100, "max_tokens": 28, "codec": "raw", **changes})


def test_prefill_workers_come_in_the_order_of_tokens_ahead() -> None:
    snapshot = Snapshot(
        prefill=(load("p0", queued_tokens=500), load("p1"), load("p2", queued_tokens=20)), decode=(load("d0"),)
    )
    placement = route(demand(), snapshot)
    assert (placement.decode, placement.prefill) == ("d0", ("p1", "p2", "p0"))
    assert (placement.page_tokens, placement.codec_hash) == (64, "r0")


@pytest.mark.parametrize(
    ("busy", "idle"),
    [
        ({"pages_free": 1}, {"pages_free": 2, "queued_tokens": 900}),  # 2 pages are needed: missing pages count most
        ({"queued_tokens": 10}, {"pages_free": 50}),  # then what waits for admission
        ({"pages_free": 60}, {"pages_free": 70}),  # then occupancy
        ({"pages_free": 60}, {"pages_free": 60, "pages_total": 90}),  # of the worker's own pool
    ],
)
def test_the_decode_worker_with_least_damage_is_chosen(busy: dict[str, int], idle: dict[str, int]) -> None:
    for order in (1, -1):
        workers = (load("busy", **busy), load("idle", **idle))[::order]
        assert route(demand(), Snapshot(prefill=(load("p0"),), decode=workers)).decode == "idle"


def test_equal_workers_share_prompts_by_their_beginning() -> None:
    snapshot = Snapshot(prefill=(load("p0"), load("p1")), decode=(load("d0"), load("d1")))
    placements = {bytes([first]): route(demand(affinity=bytes([first])), snapshot) for first in range(32)}
    assert {placement.decode for placement in placements.values()} == {"d0", "d1"}
    assert {placement.prefill[0] for placement in placements.values()} == {"p0", "p1"}
    again = Snapshot(prefill=snapshot.prefill[::-1], decode=snapshot.decode[::-1])
    for affinity, placement in placements.items():
        assert route(demand(affinity=affinity), again) == placement


def test_workers_with_other_parameters_or_pages_are_never_paired() -> None:
    snapshot = Snapshot(
        prefill=(load("p0", codecs={"raw": "r0", "tq-k4v4": "OTHER"}), load("p1", page_tokens=32)),
        decode=(load("d0"),),
    )
    assert route(demand(), snapshot).prefill == ("p0",)
    assert offered_codecs(snapshot) == ("raw",)
    with pytest.raises(Unavailable, match="share codec tq-k4v4"):
        route(demand(codec="tq-k4v4"), snapshot)


def test_small_workers_are_left_out_and_too_long_is_invalid() -> None:
    snapshot = Snapshot(prefill=(load("p0", pages_total=2), load("p1")), decode=(load("d0", pages_total=4), load("d1")))
    placement = route(demand(prompt_tokens=200, max_tokens=100), snapshot)
    assert (placement.decode, placement.prefill) == ("d1", ("p1",))
    assert token_limit(snapshot) == (6399, 6400)
    with pytest.raises(InvalidRequest, match="at most 6399 and together 6400"):
        route(demand(prompt_tokens=6400), snapshot)


def test_failed_workers_are_avoided() -> None:
    snapshot = Snapshot(prefill=(load("p0"),), decode=(load("d0"), load("d1", queued_tokens=9)))
    assert route(demand(), snapshot, avoid=["d0"]).decode == "d1"
    with pytest.raises(Unavailable):
        route(demand(), snapshot, avoid=["d0", "d1"])


def test_nothing_there() -> None:
    assert (offered_codecs(Snapshot()), token_limit(Snapshot())) == ((), (0, 0))
    with pytest.raises(Unavailable, match="raw"):
        route(demand(), Snapshot(decode=(load("d0"),)))
