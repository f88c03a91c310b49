"""The router's choices, and which codecs and lengths a routing_table allows."""

from typing import Any

import pytest
from routing_tables import KEYS, demand, load, routing_table, routing_table_of

from isthmus.cluster.router.policies import Policy
from isthmus.cluster.router.router import route, servable_codecs, token_limit
from isthmus.cluster.router.routing_table import RoutingTable
from isthmus.cluster.router.worker_columns import PrefillTime, StepTime
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE
from isthmus.proto.errors import InvalidRequest, Unavailable


def test_prefill_workers_come_in_the_order_of_what_they_cost() -> None:
    slow = PrefillTime(5, 2.0, 0.01)
    workers = routing_table(4, 1, p0={"queued_tokens": 500}, p2={"prefill": slow}, p3={"queued_tokens": 200})
    placement = route(demand(), workers)
    assert (placement.decode, placement.prefill) == ("d0", ("p1", "p3", "p0", "p2"))
    assert (placement.page_tokens, placement.codec_hash) == (64, "r0")
    assert placement.ttft_ms == pytest.approx(2 * 5 + 1000 * (0.5 + 0.5 * 0.01))


def test_a_long_context_slows_each_token() -> None:
    """Worker p0 is faster at a short prompt, p1 at a long one."""
    workers = routing_table(2, 1, p0={"prefill": PrefillTime(0, 0.1, 0.05)}, p1={"prefill": PrefillTime(0, 0.3, 0.0)})
    assert route(demand(prompt_tokens=1000), workers).prefill == ("p0", "p1")
    assert route(demand(prompt_tokens=20_000), workers).prefill == ("p1", "p0")


@pytest.mark.parametrize(
    "busy",
    [
        {"pages_free": 3},  # it would wait for pages
        {"pages_free": 20, "queued_tokens": 64_000},  # others wait for them already
        {"requests": 40},  # its steps are longer
        {"step": StepTime(50, 0.5, 0.01)},
        {"suspect": True},
        {"links": {"p0": 1.0, "p1": 1.0}},  # 10 MB of KV over a slow link
    ],
)
def test_the_cheaper_decode_worker_is_chosen(busy: dict[str, Any]) -> None:
    for name, other in (("d0", "d1"), ("d1", "d0")):
        for affinity in range(4):
            assert route(demand(affinity=affinity), routing_table(2, 2, **{name: busy})).decode == other


def test_what_is_cached_is_not_computed() -> None:
    workers = routing_table(3, 1)
    workers.prefill.prefixes.remember(workers.prefill.row_of["p2"], KEYS)
    workers.prefill.prefixes.remember(workers.prefill.row_of["p1"], KEYS[:2])
    placement = route(demand(prompt_tokens=300, prefix_keys=KEYS), workers)
    assert placement.prefill[:2] == ("p2", "p1")
    assert placement.prefill_cached_tokens == 256
    workers.prefill.update(load("p2", queued_tokens=2000))  # by now a long queue waits there
    assert route(demand(prompt_tokens=300, prefix_keys=KEYS), workers).prefill[0] == "p1"
    workers.prefill.remove("p1")
    workers.prefill.update(load("p1"))  # started anew: empty
    assert route(demand(prompt_tokens=300, prefix_keys=KEYS), workers).prefill_cached_tokens == 0


def test_a_cache_that_is_not_there_is_believed_in_no_more() -> None:
    workers = routing_table(2, 1)
    workers.prefill.prefixes.remember(workers.prefill.row_of["p0"], KEYS)
    for _ in range(20):
        placement = route(demand(prompt_tokens=300, prefix_keys=KEYS), workers)
        workers.prefill.update_prefix_trust("p0", placement.prefill_cached_tokens, 0)
    assert route(demand(prompt_tokens=300, prefix_keys=KEYS), workers).prefill_cached_tokens < 20


def test_the_decode_worker_computes_what_is_cheaper_there() -> None:
    workers = routing_table(1, 1, p0={"queued_tokens": 5000})
    assert route(demand(), workers).prefill == ("p0",)
    assert route(demand(), workers, local_prefill="when_cheaper").prefill == ()
    assert route(demand(), routing_table(1, 1), local_prefill="when_cheaper").prefill == ("p0",)
    assert route(demand(), routing_table(1, 1), local_prefill="always").prefill == ()
    assert route(demand(), routing_table(0, 1), local_prefill="when_cheaper").prefill == ()
    held = routing_table(1, 1)
    held.decode.prefixes.remember(0, KEYS)
    assert route(demand(prompt_tokens=258, prefix_keys=KEYS), held, local_prefill="when_cheaper").prefill == ()


def test_what_nobody_measured_is_taken_from_those_who_did() -> None:
    workers = routing_table_of([load("p0", prefill=PrefillTime(0, 3, 0))], [load("d0", prefill=None)])
    alone = route(demand(), workers, local_prefill="always")
    assert alone.ttft_ms == pytest.approx(3000)


def test_who_waits_may_take_more_from_those_who_do_not() -> None:
    workers = routing_table(1, 1, p0={"queued_tokens": 900}, d0={"requests": 14})
    chosen = {
        priority: route(demand(priority=priority), workers, local_prefill="when_cheaper").prefill
        for priority in (PRIORITY_INTERACTIVE, PRIORITY_BATCH)
    }
    assert chosen == {PRIORITY_INTERACTIVE: (), PRIORITY_BATCH: ("p0",)}


def test_equal_workers_share_prompts_by_their_beginning() -> None:
    placements = {affinity: route(demand(affinity=affinity), routing_table()) for affinity in range(32)}
    assert {placement.decode for placement in placements.values()} == {"d0", "d1"}
    assert {placement.prefill[0] for placement in placements.values()} == {"p0", "p1"}
    again = routing_table_of([load("p1"), load("p0")], [load("d1"), load("d0")])
    for affinity, placement in placements.items():
        assert route(demand(affinity=affinity), again) == placement


def test_several_gateways_do_not_all_choose_the_same_worker() -> None:
    """Eight gateways place 64 requests each on what they saw once: no worker gets much more than its share."""
    placed = [0] * 16
    for gateway in range(8):
        workers = routing_table(16, 1)
        for number in range(64):
            placement = route(demand(affinity=(gateway << 32) + 7919 * number), workers)
            row = workers.prefill.row_of[placement.prefill[0]]
            workers.prefill.add_placement(row, tokens=1000, pages=0, prefix_keys=())
            placed[int(placement.prefill[0][1:])] += 1
    assert max(placed) < 1.3 * sum(placed) / 16


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ("least-requests", ("d1", "p2")),
        ("least-queued-tokens", ("d0", "p1")),
        ("prefix-affinity", ("d0", "p0")),
    ],
)
def test_other_policies(policy: Policy, chosen: tuple[str, str]) -> None:
    workers = routing_table(
        *(3, 2),
        p0={"queued_tokens": 900, "requests": 6},
        p1={"requests": 5},
        p2={"queued_tokens": 800},
        d0={"requests": 2},
        d1={"queued_tokens": 50},
    )
    workers.prefill.prefixes.remember(workers.prefill.row_of["p0"], KEYS)
    workers.decode.prefixes.remember(workers.decode.row_of["d0"], KEYS)
    placement = route(demand(prompt_tokens=300, prefix_keys=KEYS), workers, policy=policy)
    assert (placement.decode, placement.prefill[0]) == chosen


def test_round_robin_takes_turns() -> None:
    chosen = [route(demand(number=number), routing_table(3, 2), policy="round-robin") for number in range(6)]
    assert [placement.prefill[0] for placement in chosen] == ["p0", "p1", "p2"] * 2
    assert [placement.decode for placement in chosen] == ["d0", "d1"] * 3


def test_workers_with_other_parameters_or_pages_are_never_paired() -> None:
    workers = routing_table(2, 1, p0={"codecs": {"raw": "r0", "tq-k4v4": "OTHER"}}, p1={"page_tokens": 32})
    assert route(demand(), workers).prefill == ("p0",)
    assert servable_codecs(workers) == ("raw",)
    with pytest.raises(Unavailable, match="share codec tq-k4v4"):
        route(demand(codec="tq-k4v4"), workers)


def test_small_workers_are_left_out_and_too_long_is_invalid() -> None:
    small = routing_table(
        2, 2, p0={"pages_total": 2}, p1={"pages_total": 100}, d0={"pages_total": 4}, d1={"pages_total": 100}
    )
    placement = route(demand(prompt_tokens=200, max_tokens=100), small)
    assert (placement.decode, placement.prefill) == ("d1", ("p1",))
    assert token_limit(small) == (6399, 6400)
    with pytest.raises(InvalidRequest, match="at most 6399 and together 6400"):
        route(demand(prompt_tokens=6400), small)


def test_failed_workers_are_avoided() -> None:
    assert route(demand(), routing_table(1, 2, d1={"requests": 9}), avoid=["d0"]).decode == "d1"
    with pytest.raises(Unavailable):
        route(demand(), routing_table(), avoid=["d0", "d1"])


def test_nothing_there() -> None:
    assert (servable_codecs(RoutingTable()), token_limit(RoutingTable())) == ((), (0, 0))
    for workers in (RoutingTable(), routing_table(0, 1)):
        with pytest.raises(Unavailable, match="raw"):
            route(demand(), workers)


def test_a_worker_that_left_is_not_chosen() -> None:
    workers = routing_table(1, 1)
    workers.decode.remove("d0")
    with pytest.raises(Unavailable, match="raw"):
        route(demand(), workers, local_prefill="when_cheaper")
    workers.decode.update(load("d1"))
    assert route(demand(), workers).decode == "d1"
