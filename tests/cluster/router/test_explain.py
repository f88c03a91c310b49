"""The table of candidates says what the router goes by, on the wire and on the command line."""

import asyncio
import json

import pytest
from routing_tables import KEYS, demand, routing_table
from scripted import client_of, says, scripted_cluster

from isthmus.cluster.cli.main import run
from isthmus.cluster.client.client import build_request
from isthmus.cluster.router.explain import explain
from isthmus.cluster.router.router import route


def test_the_parts_add_up_and_the_cheapest_is_chosen() -> None:
    workers = routing_table(3, 2, p0={"queued_tokens": 700}, p2={"queued_tokens": 300}, d0={"requests": 20})
    workers.prefill.prefixes.remember(workers.prefill.row_of["p0"], KEYS)
    asked = demand(prompt_tokens=300, prefix_keys=KEYS)
    placement = route(asked, workers, local_prefill="when_cheaper")
    lines = explain(asked, workers, placement, local_prefill="when_cheaper")
    assert len(lines) == 2 * (3 + 1)
    assert [line.chosen for line in lines] == [True] + [False] * 7
    assert (lines[0].decode, lines[0].prefill) == (placement.decode, placement.prefill[0])
    assert lines[0].queue_ms + lines[0].compute_ms == pytest.approx(placement.ttft_ms)
    for line in lines:
        parts = line.wait_ms + line.steps_ms + line.queue_ms + line.transfer_ms + line.damage_ms
        assert line.total_ms == pytest.approx(parts + line.compute_ms * (1.5 if line.prefill == "" else 1))
        assert line.cached_tokens == (256 if line.prefill == "p0" else 0)


def test_a_local_prompt_is_expected_after_its_own_compute() -> None:
    """What the requests there lose by it is part of its price, but nothing that it waits for."""
    workers = routing_table(1, 1, p0={"queued_tokens": 9000}, d0={"requests": 6, "pages_free": 10})
    workers.decode.prefixes.remember(0, KEYS)
    asked = demand(prompt_tokens=300, prefix_keys=KEYS)
    placement = route(asked, workers, local_prefill="when_cheaper")
    (line,) = [line for line in explain(asked, workers, placement, local_prefill="when_cheaper") if line.chosen]
    assert (line.prefill, line.held_tokens) == ("", 256)
    assert line.damage_ms > 0
    assert placement.ttft_ms == pytest.approx(line.wait_ms + line.compute_ms)


async def test_over_the_wire() -> None:
    async with (
        scripted_cluster(says("a"), says("a"), local_prefill="never") as cluster,
        client_of(cluster.gateway) as client,
    ):
        explanation = await client.explain(build_request(prompt="p" * 100))
        assert (explanation.policy, explanation.prompt_tokens) == ("cost", 100)
        assert len(explanation.candidates) == 2
        assert not any(worker.requests for worker in cluster.decodes)
        request = build_request(prompt="p" * 100)
        assert not (await client.answer(request)).timings.candidates
        request.explain = True
        timings = (await client.answer(request)).timings
        chosen = [candidate for candidate in timings.candidates if candidate.chosen]
        assert [(c.decode, c.prefill) for c in chosen] == [(timings.decode_worker, cluster.prefill.address)]


async def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    async with scripted_cluster(says("a")) as cluster:
        admin = cluster.gateway.admin_address
        assert await asyncio.to_thread(run, ["explain", "hello", "--admin", admin]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("chosen  decode") and "\nyes " in shown and "policy cost" in shown
        assert await asyncio.to_thread(run, ["explain", "hello", "--json", "--admin", admin]) == 0
        table = json.loads(capsys.readouterr().out)
        assert [line["prefill"] for line in table["candidates"]] == [cluster.prefill.address, ""]
