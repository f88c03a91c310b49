"""The router: decisions per second, and its policies compared on recorded traffic.

    python benchmarks/router.py --json router.json --idle 64 \\
        --trace conversation_trace.jsonl.gz --trace conv.csv.gz

Decisions are made on one core, for prompts of which two thirds begin with what some or all workers have, while every
worker reports ten times a second; placements are decisions that are also counted on the table, until the next report.
Goals, in decisions: 20,000/s with 16 workers, 2,000/s with 1,024.

A trace is a file of Mooncake (JSON lines with `timestamp`, `input_length`, `output_length`, `hash_ids`) or of Azure's
LLM inference traces (CSV with `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`), plain or gzipped. It is replayed in the
queue model (`support/queue_model.py`) of 16 prefill and 16 decode workers, sped up so that computing every prompt in
full would take `--load` of all prefill workers. Goal: p95 TTFT of the cost model at most 0.8 of least-requests, and no
worse than with local prefill always or never. `ideal` is what no policy can get below: no prompt waits.

With `--idle 64` a real gateway process watches so many idle workers; goal: under 5 % of a core.
"""

import argparse
import csv
import gzip
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np
from idle import idle_share
from support.help import Paragraphs
from support.queue_model import BLOCK, PREFILL, STEP, Arrival, Simulation, compute_ms
from support.report import Report, conditions, say

from isthmus.cluster.router.costs import Demand
from isthmus.cluster.router.policies import LocalPrefill, Policy
from isthmus.cluster.router.router import route
from isthmus.cluster.router.routing_table import RoutingTable
from isthmus.cluster.router.worker_columns import WorkerColumns, WorkerLoad

REPORTS_S = 10  # of each worker; as often as they may, were they never idle
IDLE_S = 20.0
LOADS = (0.7, 0.9)
POLICIES: dict[str, tuple[Policy, LocalPrefill]] = {
    "cost": ("cost", "when_cheaper"),
    "round-robin": ("round-robin", "never"),
    "least-requests": ("least-requests", "never"),
    "least-queued-tokens": ("least-queued-tokens", "never"),
    "prefix-affinity": ("prefix-affinity", "never"),
    "always-remote": ("cost", "never"),
    "always-local": ("cost", "always"),
}


def speeds(workers: int, seconds: float) -> tuple[float, float]:
    """Decisions per second with so many workers, half of each role; and placements, which are counted on the table.

    Every worker reports REPORTS_S times a second of the time that is measured, something else each time.
    """
    draw, table = random.Random(workers), RoutingTable()
    half = workers // 2
    names = [(columns, f"{role}{number}") for number in range(half) for columns, role in _roles(table)]

    def report(columns: WorkerColumns, name: str) -> None:
        busy = {"queued_tokens": draw.randrange(8000)} if columns is table.prefill else {"requests": draw.randrange(32)}
        pages = {"page_tokens": 64, "pages_total": 20_000, "pages_free": draw.randrange(10_000, 20_000)}
        codecs = {"raw": "r", "tq-k4v4": "t"}
        columns.update(WorkerLoad(address=name, codecs=codecs, prefill=PREFILL, step=STEP, **pages, **busy))

    for columns, name in names:
        report(columns, name)
    demands = _demands(draw, table)

    def decide(demand: Demand) -> None:
        route(demand, table, local_prefill="when_cheaper")

    def place(demand: Demand) -> None:
        placement = route(demand, table, local_prefill="when_cheaper")
        row = table.decode.row_of[placement.decode]
        table.decode.add_placement(row, tokens=0, pages=len(demand.prefix_keys), prefix_keys=demand.prefix_keys)
        for first in placement.prefill[:1]:
            missing, row = demand.prompt_tokens - placement.prefill_cached_tokens, table.prefill.row_of[first]
            table.prefill.add_placement(row, tokens=missing, pages=0, prefix_keys=demand.prefix_keys)

    in_turn = cycle(names)

    def rate(call: Callable[[Demand], None]) -> float:
        calls, reports, begun, endless = 0, 0, time.process_time(), cycle(demands)
        while (took := time.process_time() - begun) < seconds:
            for columns, name in islice(in_turn, int(took * REPORTS_S * workers) - reports):
                report(columns, name)
                reports += 1
            for demand in islice(endless, 20):
                call(demand)
            calls += 20
        return calls / took

    return rate(decide), rate(place)


def _roles(table: RoutingTable) -> tuple[tuple[WorkerColumns, str], ...]:
    return (table.prefill, "p"), (table.decode, "d")


def _demands(draw: random.Random, table: RoutingTable) -> list[Demand]:
    """Prompts of 1 to 16 pages: some of them new; others go on with what a few workers of each role have; and some of
    these begin with a system prompt that all workers have."""
    shared = [tuple((64 * page, draw.randbytes(16)) for page in (1, 2)) for _ in range(4)]
    prompts = [tuple((64 * (page + 1), draw.randbytes(16)) for page in range(draw.randrange(1, 16))) for _ in range(96)]
    prompts[64:] = [draw.choice(shared) + prompt[2:] for prompt in prompts[64:]]
    for columns, _ in _roles(table):
        for row in columns.row_of.values():
            for prompt in shared:
                columns.prefixes.remember(row, prompt)
        for prompt in prompts[32:]:
            for row in draw.sample(sorted(columns.row_of.values()), draw.randrange(1, 4)):
                columns.prefixes.remember(row, prompt[: draw.randrange(1, len(prompt) + 1)])
    return [
        Demand(
            prompt_tokens=len(keys) * 64 + draw.randrange(1, 64),
            max_tokens=256,
            codec="tq-k4v4",
            affinity=draw.getrandbits(64),
            prefix_keys=keys,
        )
        for keys in (draw.choice(prompts) for _ in range(1000))
    ]


def arrivals(path: Path) -> Iterator[Arrival]:
    """The requests of a trace, in order. Requests with one time stamp are spread up to the next one."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        if ".csv" in path.name:
            rows = list(csv.DictReader(lines))
            times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
            for at_s, row in zip(times, rows, strict=True):
                yield Arrival(at_s - times[0], int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"])), ())
            return
        rows = [json.loads(line) for line in lines]
    stamps = sorted({row["timestamp"] for row in rows})
    following = dict(zip(stamps, [*stamps[1:], stamps[-1] + 1000], strict=True))
    place, together = 0, {stamp: sum(row["timestamp"] == stamp for row in rows) for stamp in stamps}
    last = None
    for row in rows:
        stamp = row["timestamp"]
        place = place + 1 if stamp == last else 0
        last = stamp
        at_s = (stamp + (following[stamp] - stamp) * place / together[stamp]) / 1e3
        full = row["hash_ids"][: row["input_length"] // BLOCK]
        blocks = tuple(((number + 1) * BLOCK, identity.to_bytes(16, "big")) for number, identity in enumerate(full))
        yield Arrival(at_s, row["input_length"], max(1, row["output_length"]), blocks)


def at_load(trace: list[Arrival], load: float, prefill: int) -> list[Arrival]:
    """The same requests in other time: computing all prompts in full takes `load` of the prefill columns."""
    busy_s = sum(compute_ms(arrival.prompt_tokens, 0) for arrival in trace) / 1e3
    factor = busy_s / (load * prefill * (trace[-1].at_s - trace[0].at_s))
    return [replace(arrival, at_s=arrival.at_s * factor) for arrival in trace]


def replayed(path: Path, load: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All policies on one trace at one load, and `ideal`: no prompt waits, and all that was ever computed is cached."""
    trace = at_load(list(arrivals(path))[: args.requests], load, args.workers // 2)
    rows = [_row(path, load, "ideal", ideal_ms(trace))]
    for name, (policy, local) in POLICIES.items():
        half = args.workers // 2
        ttft, itl = Simulation(policy, local, prefill=half, decode=args.workers - half).run(trace)
        rows.append(_row(path, load, name, ttft) | {"itl_p99_ms": round(_weighted(itl, 0.99), 2)})
    return rows


def ideal_ms(trace: list[Arrival]) -> list[float]:
    """The least that each TTFT can be: its prompt's own compute, with every block cached that any request had before.

    No policy can do better in the queue model, where a worker computes a prompt alone.
    """
    seen, times = set[bytes](), []
    for arrival in trace:
        cached = 0
        for tokens, block in arrival.blocks:
            if block not in seen:
                break
            cached = tokens
        seen.update(block for _, block in arrival.blocks)
        times.append(compute_ms(arrival.prompt_tokens, cached))
    return times


def _row(path: Path, load: float, policy: str, ttft_ms: list[float]) -> dict[str, Any]:
    p50, p95 = np.percentile(ttft_ms, (50, 95))
    row = {"trace": path.name, "load": load, "policy": policy}
    return row | {"ttft_p50_ms": round(float(p50), 1), "ttft_p95_ms": round(float(p95), 1)}


def _weighted(values: list[tuple[float, float]], share: float) -> float:
    """The value that `share` of the weight does not exceed."""
    ordered = np.array(sorted(values))
    reached = np.searchsorted(ordered[:, 1].cumsum(), share * ordered[:, 1].sum())
    return float(ordered[min(reached, len(ordered) - 1), 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, action="append", default=[])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of workers")
    parser.add_argument("--workers", type=int, default=32, help="of the replay")
    parser.add_argument(
        "--load", type=float, action="append", help="of the prefill workers, were nothing cached; 0.7 and 0.9"
    )
    parser.add_argument("--idle", type=int, default=0, help="idle workers whose watching is measured; 0: not")
    parser.add_argument("--requests", type=int, default=None, help="of each trace; all where not given")
    args = parser.parse_args()
    with Report(args.json) as report:
        about = conditions(seconds=args.seconds, replay_workers=args.workers, replay_requests=args.requests)
        report.put(conditions=about, decisions_per_s={}, placements_per_s={})
        for workers in (16, 1024):
            say(f"decisions with {workers} workers")
            decisions, placements = speeds(workers, args.seconds)
            report.figures["decisions_per_s"][str(workers)] = round(decisions)
            report.figures["placements_per_s"][str(workers)] = round(placements)
        if args.idle:
            say(f"{args.idle} idle workers")
            report.put(idle_workers=args.idle, idle_workers_cpu_share=round(idle_share(args.idle, IDLE_S), 4))
        report.put(replay=[])
        for path, load in product(args.trace, args.load or LOADS):
            say(f"replay of {path.name} at load {load}")
            for row in replayed(path, load, args):
                report.append("replay", row)


if __name__ == "__main__":
    main()
