"""The router's vectors against the cost model of docs/routing.md, worker by worker in plain numbers."""

import math
import random
from dataclasses import dataclass, field

import pytest
from routing_tables import demand, load, routing_table_of

from isthmus.cluster.router.costs import Demand
from isthmus.cluster.router.prefixes import PrefixKeys
from isthmus.cluster.router.router import route
from isthmus.cluster.router.routing_table import RoutingTable
from isthmus.cluster.router.worker_columns import EXCLUDED, SUSPECT, PrefillTime, StepTime, WorkerLoad
from isthmus.kernels.splitmix64 import mix
from isthmus.proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD

DAMAGE = {PRIORITY_INTERACTIVE: 0.5, PRIORITY_STANDARD: 1.0, PRIORITY_BATCH: 2.0}


@dataclass
class Model:
    """One request and all workers: what each costs."""

    asked: Demand
    prefill: list[WorkerLoad]
    decode: list[WorkerLoad]
    wire_bytes: float
    output_tokens: float
    given: dict[str, list[PrefixKeys]] = field(default_factory=dict)  # prompts that a worker was given
    trust: dict[str, float] = field(default_factory=dict)

    def cached(self, address: str) -> float:
        """Tokens of the prompt that a worker has."""
        known = {step for steps in self.given.get(address, ()) for step in steps}
        prefix = 0
        for step in self.asked.prefix_keys:
            if step not in known:
                break
            prefix = step[0]
        return min(prefix * self.trust.get(address, 1.0), self.asked.prompt_tokens - 1)

    def compute(self, worker: WorkerLoad) -> float:
        """The prompt, less what is cached."""
        assert worker.prefill is not None
        tokens, cached, rate = self.asked.prompt_tokens, self.cached(worker.address), worker.prefill
        chunks = math.ceil((tokens - cached) / 512)
        pairs = (tokens * tokens - cached * cached) / 2e3
        return chunks * rate.ms + (tokens - cached) * rate.ms_token + pairs * rate.ms_ktoken

    def remote(self, worker: WorkerLoad) -> float:
        """Queue and compute on a prefill worker."""
        assert worker.prefill is not None
        token = worker.prefill.ms_token + self.asked.prompt_tokens / 2e3 * worker.prefill.ms_ktoken
        return (SUSPECT if worker.suspect else 0.0) + worker.queued_tokens * token + self.compute(worker)

    def step(self, worker: WorkerLoad) -> float:
        """Of a decode worker now."""
        assert worker.step is not None
        used = worker.pages_total - worker.pages_free
        return worker.step.ms + worker.requests * worker.step.ms_sequence + used * worker.step.ms_page

    def wait(self, worker: WorkerLoad) -> float:
        """For pages that are missing."""
        free, used = worker.pages_free * 64, (worker.pages_total - worker.pages_free) * 64
        missing = max(0.0, self.asked.tokens - (free - worker.queued_tokens)) / max(used, 1)
        return min(missing, 8.0) * min(self.asked.max_tokens, self.output_tokens) * self.step(worker)

    def own(self, worker: WorkerLoad) -> float:
        """Wait, the request's steps, and what they add to those of others for half of them."""
        assert worker.step is not None
        steps = 0.05 * min(self.asked.max_tokens, self.output_tokens)
        adds = worker.step.ms_sequence + self.asked.tokens / 64 * worker.step.ms_page
        others = 0.5 * DAMAGE[self.asked.priority] * worker.requests * adds
        penalty = SUSPECT if worker.suspect else 0.0
        return penalty + self.wait(worker) + steps * (self.step(worker) + adds + others)

    def alone(self, worker: WorkerLoad) -> float:
        """The prompt on the decode worker itself, and what the requests there lose by it."""
        return (1.5 + 0.05 * DAMAGE[self.asked.priority] * worker.requests) * self.compute(worker)

    def sent(self, worker: WorkerLoad, rate: float, hidden_ms: float) -> float:
        """What the transfer takes longer than what is computed meanwhile."""
        missing = (self.asked.prompt_tokens - self.cached(worker.address)) * self.wire_bytes
        return max(0.0, missing / rate - hidden_ms)


def preferred(costs: dict[str, float], near_ms: float, table: RoutingTable, affinity: int) -> str:
    """The cheapest; of nearly equal ones the one that the affinity prefers."""
    seeds = {a: workers.seeds[workers.row_of[a]] for workers in (table.prefill, table.decode) for a in workers.row_of}
    least = min(costs.values())
    near = [address for address, cost in costs.items() if cost <= least + near_ms]
    return min(near, key=lambda address: mix(seeds[address] ^ affinity))


def expected(model: Model, table: RoutingTable, local: str) -> tuple[str, str, float]:
    """Decode worker, prefill worker ("" for none) and expected TTFT."""
    affinity = model.asked.affinity
    best = min((model.remote(worker) for worker in model.prefill), default=math.inf) if local != "always" else math.inf
    totals = {}
    for worker in model.decode:
        rate = len(worker.links) / sum(1 / r for r in worker.links.values()) if worker.links else 1e6
        paired = best + model.sent(worker, rate, best) if best < EXCLUDED else math.inf
        totals[worker.address] = model.own(worker) + min(paired, math.inf if local == "never" else model.alone(worker))
    near_ms = max(1.0, 0.05 * min(model.own(worker) for worker in model.decode))
    chosen = preferred(totals, near_ms, table, affinity)
    decode = next(worker for worker in model.decode if worker.address == chosen)
    alone = math.inf if local == "never" else model.alone(decode)
    if best < EXCLUDED:
        typical = table.decode.link[table.decode.row_of[chosen]]
        pairs = {
            worker.address: model.remote(worker)
            + model.sent(decode, decode.links.get(worker.address, typical), model.remote(worker))
            for worker in model.prefill
        }
        first = preferred(pairs, max(1.0, 0.05 * min(pairs.values())), table, affinity)
        if pairs[first] <= alone:
            return chosen, first, model.wait(decode) + pairs[first]
    return chosen, "", model.wait(decode) + model.compute(decode)


def random_load(draw: random.Random, name: str, peers: list[str]) -> WorkerLoad:
    total = 1000
    return load(
        name,
        pages_free=draw.choice((total, draw.randrange(total), draw.randrange(20))),
        queued_tokens=draw.choice((0, draw.randrange(3000))),
        requests=draw.choice((0, draw.randrange(30))),
        suspect=draw.random() < 0.03,
        prefill=PrefillTime(draw.uniform(0, 20), draw.uniform(0.05, 2), draw.uniform(0, 0.05)),
        step=StepTime(draw.uniform(1, 20), draw.uniform(0, 2), draw.uniform(0, 0.01)),
        links={peer: draw.choice((10.0, 1e4, 1e6)) for peer in peers if draw.random() < 0.5},
    )


def random_case(draw: random.Random) -> tuple[Model, RoutingTable]:
    most = draw.choice((4, 4, 12, 12, 40, 150))
    names = [f"p{number}" for number in range(draw.randrange(1, most))]
    prefill = [random_load(draw, name, []) for name in names]
    decode = [random_load(draw, f"d{number}", names) for number in range(draw.randrange(1, most))]
    table = routing_table_of(prefill, decode)
    prompts = [tuple((64 * (page + 1), bytes([kind, page])) for page in range(12)) for kind in range(3)]
    steps = draw.choice(prompts)[: draw.randrange(13)]
    asked = demand(
        prompt_tokens=64 * len(steps) + draw.randrange(1, 2000),
        max_tokens=draw.randrange(1, 400),
        affinity=draw.getrandbits(64),
        prefix_keys=steps,
        priority=draw.choice(list(DAMAGE)),
    )
    table.record_transfer("raw", 1, draw.choice((10, 10_000, 100_000)))
    model = Model(asked, prefill, decode, table.wire_bytes("raw"), table.output_tokens)
    for workers in (table.prefill, table.decode):
        for address, row in workers.row_of.items():
            model.given[address] = [draw.choice(prompts)[: draw.randrange(13)] for _ in range(draw.randrange(3))]
            for given in model.given[address]:
                workers.prefixes.remember(row, given)
            for _ in range(draw.choice((0, 0, 3))):
                workers.update_prefix_trust(address, 100.0, draw.randrange(100))
            model.trust[address] = workers.prefix_trust[row]
    return model, table


@pytest.mark.parametrize("seed", range(4))
def test_random_pools(seed: int) -> None:
    draw, alone = random.Random(seed), 0
    for _ in range(250):
        model, table = random_case(draw)
        local = draw.choice(("never", "when_cheaper", "always"))
        placement = route(model.asked, table, local_prefill=local)
        decode, prefill, ttft_ms = expected(model, table, local)
        assert (placement.decode, placement.prefill[:1]) == (decode, (prefill,) if prefill else ())
        assert placement.ttft_ms == pytest.approx(ttft_ms, rel=1e-6)
        assert placement.decode_cached_tokens == pytest.approx(model.cached(decode))
        assert not prefill or placement.prefill_cached_tokens == pytest.approx(model.cached(prefill))
        alone += not prefill
    assert 50 < alone < 200
