"""A simple queue model of a cluster, to compare routing policies on recorded traffic: no network, no tokens, only time.

A prefill worker computes its prompts one after the other and keeps their blocks in an LRU cache. A decode worker steps
all its requests together; a prompt that it computes itself goes in chunks between the steps, so that either slows the
other. Prompts that ran there stay in its free pages, as those of real ones do (docs/reuse.md): what it holds is neither
sent to it nor computed by it. Workers report to the router every REPORT_S of simulated time; between reports the router
counts what it placed, and is told what was cached when a prompt's KV is there. It knows the rates that the model uses.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from isthmus.cluster.router.costs import Demand
from isthmus.cluster.router.policies import LocalPrefill, Policy
from isthmus.cluster.router.prefixes import PrefixKeys
from isthmus.cluster.router.router import Placement, route
from isthmus.cluster.router.routing_table import RoutingTable
from isthmus.cluster.router.worker_columns import PrefillTime, StepTime, WorkerLoad

REPORT_S = 0.1
PAGE, CHUNK = 64, 512
BLOCK = 512  # tokens of a hash id in Mooncake's traces
PREFILL = PrefillTime(2.0, 0.2, 0.004)  # 5,000 tokens/s at short contexts
STEP = StepTime(8.0, 0.1, 0.001)
PAGES = 20_000  # of a decode worker
CACHED_BLOCKS = 4_000  # of a prefill worker
BYTES_PER_TOKEN, LINK = 32_000, 1.25e6  # packed KV of an 8B model; 10 Gbit/s in bytes per ms


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: PrefixKeys  # (tokens up to there, address) of each full block


def compute_ms(tokens: int, cached: int) -> float:
    """Time of a prompt of which `cached` tokens need not be computed."""
    left = max(1, tokens - cached)
    chunks = -(-left // CHUNK)
    return chunks * PREFILL.ms + left * (PREFILL.ms_token + (tokens + cached) / 2e3 * PREFILL.ms_ktoken)


class BlockCache:
    """Blocks of prompts; those unused for longest go first."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def find(self, request: Arrival) -> int:
        """Tokens of the longest prefix that is here."""
        found = 0
        for tokens, block in request.blocks:
            if block not in self._blocks:
                break
            found = tokens
        return found

    def keep(self, request: Arrival, most: int) -> None:
        """Takes a prompt's blocks; at most so many stay."""
        for _, block in reversed(request.blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > most:
            self._blocks.popitem(last=False)


@dataclass
class PrefillModel:
    """One prompt after the other; `free_s` is when the last of them is done."""

    free_s: float = 0.0
    queue: deque[tuple[float, float, int]] = field(default_factory=deque)  # start, end, tokens to compute
    cache: BlockCache = field(default_factory=BlockCache)

    def take(self, now_s: float, request: Arrival) -> tuple[float, int]:
        """When the request's first token is there, and how many tokens were cached."""
        cached = self.cache.find(request)
        self.cache.keep(request, CACHED_BLOCKS)
        start = max(now_s, self.free_s)
        self.free_s = start + compute_ms(request.prompt_tokens, cached) / 1e3
        self.queue.append((start, self.free_s, max(1, request.prompt_tokens - cached)))
        return self.free_s, cached

    def load(self, now_s: float) -> tuple[float, int]:
        """Tokens that are not computed yet, and requests."""
        while self.queue and self.queue[0][1] <= now_s:
            self.queue.popleft()
        tokens = 0.0
        for start, end, count in self.queue:
            tokens += count * (1.0 if now_s <= start else (end - now_s) / (end - start))
        return tokens, len(self.queue)


@dataclass
class DecodeModel:
    """A batch in which all advance alike, and prompts that are computed between its steps."""

    at_s: float = 0.0
    running: dict[int, list[float]] = field(default_factory=dict)  # request -> [tokens left, pages]
    local: deque[list[float]] = field(default_factory=deque)  # [request, ms left, ms of a chunk, output, pages]
    pages: float = 0.0  # reserved, from placement to the end
    coming: int = 0  # requests whose KV is on its way
    version: int = 0
    cache: BlockCache = field(default_factory=BlockCache)
    itl: list[tuple[float, float]] = field(default_factory=list)  # (ms, tokens)

    def keep(self, request: Arrival) -> None:
        """A prompt's KV is here: it stays while nobody else needs the pages."""
        self.cache.keep(request, max(0, PAGES - round(self.pages)) * PAGE // BLOCK)

    def cycle_ms(self) -> tuple[float, float]:
        """Time for a token of everybody, and how much of it goes to the prompt that is computed."""
        step = STEP.ms + len(self.running) * STEP.ms_sequence + self.pages * STEP.ms_page if self.running else 0.0
        chunk = min(self.local[0][1], self.local[0][2]) if self.local else 0.0
        return max(step + chunk, 1e-9), chunk

    def advance(self, now_s: float) -> None:
        """Lets time pass in which no request comes or goes."""
        ms = (now_s - self.at_s) * 1e3
        self.at_s = now_s
        if ms <= 0:
            return
        cycle, chunk = self.cycle_ms()
        if self.running:
            tokens = ms / cycle
            self.itl.append((cycle, tokens * len(self.running)))
            for state in self.running.values():
                state[0] -= tokens
        if self.local:
            self.local[0][1] -= ms * chunk / cycle

    def next_s(self) -> float | None:
        """When the next request is done with its prompt or its output, if nothing else happens."""
        cycle, chunk = self.cycle_ms()
        ends = [min(state[0] for state in self.running.values()) * cycle] if self.running else []
        if self.local:
            ends.append(self.local[0][1] * cycle / chunk if chunk > 0 else 0.0)
        return self.at_s + max(0.0, min(ends)) / 1e3 if ends else None

    def settle(self) -> int | None:
        """Takes out what is done; the request whose prompt was."""
        for request in [request for request, state in self.running.items() if state[0] <= 1e-6]:
            self.pages -= self.running.pop(request)[1]
        if self.local and self.local[0][1] <= 1e-6:
            request, _, _, output, pages = self.local.popleft()
            self.running[int(request)] = [output, pages]
            return int(request)
        return None


class Simulation:
    """One policy on one trace; `run` returns the TTFT of each request in ms, and (ITL in ms, tokens)."""

    def __init__(self, policy: Policy, local_prefill: LocalPrefill, *, prefill: int, decode: int) -> None:
        self._policy: Policy = policy
        self._local: LocalPrefill = local_prefill
        self._prefill = {f"prefill-{number}": PrefillModel() for number in range(prefill)}
        self._decode = {f"decode-{number}": DecodeModel() for number in range(decode)}
        self._table = RoutingTable()
        self._reported_s = -1.0
        self._events: list[
            tuple[float, int, str, int, int]
        ] = []  # time, order, decode worker, version, request to start
        self._order = 0
        self._ttft: dict[int, float] = {}
        self._placed: dict[int, tuple[Placement, int, int]] = {}  # what the decode worker holds, and what was cached
        self._trace: Sequence[Arrival] = ()

    def run(self, trace: Sequence[Arrival]) -> tuple[list[float], list[tuple[float, float]]]:
        self._trace = trace
        for number, arrival in enumerate(trace):
            self._until(arrival.at_s)
            self._report(arrival.at_s)
            self._place(number, arrival)
        self._until(float("inf"))
        return [self._ttft[number] for number in range(len(trace))], [
            pair for model in self._decode.values() for pair in model.itl
        ]

    def _place(self, number: int, arrival: Arrival) -> None:
        demand = Demand(
            prompt_tokens=arrival.prompt_tokens,
            max_tokens=arrival.output_tokens,
            codec="kv",
            affinity=_affinity(number, arrival),
            prefix_keys=arrival.blocks,
            number=number,
        )
        placement = route(demand, self._table, policy=self._policy, local_prefill=self._local)
        prefill, decode, now = self._table.prefill, self._table.decode, arrival.at_s
        pages, keys = -(-demand.tokens // PAGE), arrival.blocks
        decode.add_placement(decode.row_of[placement.decode], tokens=0, pages=pages, prefix_keys=keys)
        model = self._decode[placement.decode]
        model.advance(now)
        model.pages += pages
        held = model.cache.find(arrival)
        self._placed[number] = placement, held, held
        if placement.prefill:
            first = placement.prefill[0]
            missing = arrival.prompt_tokens - placement.prefill_cached_tokens
            prefill.add_placement(prefill.row_of[first], tokens=missing, pages=0, prefix_keys=keys)
            done_s, cached = self._prefill[first].take(now, arrival)
            self._placed[number] = placement, held, max(held, cached)
            self._ttft[number] = (done_s - now) * 1e3
            sent_s = max(done_s, now + (arrival.prompt_tokens - held) * BYTES_PER_TOKEN / LINK / 1e3)
            self._push(sent_s, placement.decode, -1, number)
            model.coming += 1
            self._reschedule(placement.decode)
            return
        ms = compute_ms(arrival.prompt_tokens, held)
        chunk = ms / max(1, -(-(arrival.prompt_tokens - held) // CHUNK))
        model.local.append([number, ms, chunk, arrival.output_tokens, pages])
        self._reschedule(placement.decode)

    def _learn(self, number: int) -> None:
        """A prompt's KV is on its decode worker: that keeps it, and the router learns what was cached."""
        placement, held, found = self._placed.pop(number)
        self._decode[placement.decode].keep(self._trace[number])
        self._table.decode.update_prefix_trust(placement.decode, placement.decode_cached_tokens, held)
        for first in placement.prefill[:1]:
            self._table.prefill.update_prefix_trust(first, placement.prefill_cached_tokens, found)

    def _until(self, now_s: float) -> None:
        """Lets everything happen that happens before a moment."""
        while self._events and self._events[0][0] <= now_s:
            at_s, _, name, version, starts = heapq.heappop(self._events)
            model = self._decode[name]
            if starts < 0 and version != model.version:
                continue
            model.advance(at_s)
            if starts >= 0:
                arrival = self._trace[starts]
                pages = -(-(arrival.prompt_tokens + arrival.output_tokens) // PAGE)
                model.running[starts] = [arrival.output_tokens, pages]
                model.coming -= 1
                self._learn(starts)
            done = model.settle()
            if done is not None:
                self._learn(done)
                self._ttft[done] = (at_s - self._trace[done].at_s) * 1e3
            self._reschedule(name)

    def _reschedule(self, name: str) -> None:
        model = self._decode[name]
        model.version += 1
        next_s = model.next_s()
        if next_s is not None:
            self._push(next_s, name, model.version, -1)

    def _push(self, at_s: float, name: str, version: int, starts: int) -> None:
        self._order += 1
        heapq.heappush(self._events, (at_s, self._order, name, version, starts))

    def _report(self, now_s: float) -> None:
        """What all workers report, where their last report is old."""
        if now_s < self._reported_s + REPORT_S:
            return
        self._reported_s = now_s
        for name, model in self._prefill.items():
            tokens, requests = model.load(now_s)
            self._table.prefill.update(_load(name, queued_tokens=round(tokens), requests=requests, prefill=PREFILL))
        for name, model in self._decode.items():
            requests = len(model.running) + len(model.local) + model.coming
            free = max(0, PAGES - round(model.pages))
            self._table.decode.update(_load(name, pages_free=free, requests=requests, prefill=PREFILL, step=STEP))


def _affinity(number: int, arrival: Arrival) -> int:
    """64 bits, equal where prompts begin alike."""
    beginning = arrival.blocks[0][1] if arrival.blocks else str(number).encode()
    return int.from_bytes(blake2b(beginning, digest_size=8).digest(), "big")


def _load(name: str, *, pages_free: int = PAGES, queued_tokens: int = 0, requests: int = 0, **rates: Any) -> WorkerLoad:
    return WorkerLoad(
        address=name,
        codecs={"kv": "1"},
        page_tokens=PAGE,
        pages_total=PAGES,
        pages_free=pages_free,
        queued_tokens=queued_tokens,
        requests=requests,
        **rates,
    )
