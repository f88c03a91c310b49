"""What a request costs on each worker, in milliseconds: pure functions of the workers' columns.

    remote = wait for pages + steps + queue at the prefill worker + compute of uncached tokens
             + transfer that the compute does not hide
    local  = wait for pages + steps + compute of uncached tokens + what that takes from running requests

`steps` prices the decode worker: the time of the request's own steps, and what it adds to those of the others, for the
tokens that an answer has on average. A millisecond of ITL is worth ITL_WEIGHT milliseconds of TTFT.
"""

from dataclasses import dataclass
from struct import Struct

import numpy as np

from ...proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from .cost_vectors import Costs, as_costs
from .prefixes import FEW_ROWS, PrefixKeys
from .routing_table import RoutingTable
from .worker_columns import COMPUTE, Floats, Term, WorkerColumns

ITL_WEIGHT = 0.05
LOCAL_MARGIN = 1.5  # the decode worker's time costs more: requests that come next will need it
CHUNK_TOKENS = 512  # of a prefill chunk, for its fixed cost
LOCAL_WEIGHTS, REMOTE_WEIGHTS, OWN_WEIGHTS = slice(0, 6), slice(6, 12), slice(12, 18)  # of `all_weights`
PACK_WEIGHTS = Struct("18d").pack  # twice as fast as making a vector of a tuple
# How much the delay of others counts: an interactive request may take more from those who do not wait.
DAMAGE_WEIGHT: dict[int, float] = {PRIORITY_INTERACTIVE: 0.5, PRIORITY_BATCH: 2.0}

Weights = tuple[float, ...]  # of consecutive terms
Cached = dict[int, float]  # tokens of a prompt that are predicted to be cached, by row; only rows that have any


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What the router knows of a request."""

    prompt_tokens: int
    max_tokens: int
    codec: str
    affinity: int = 0  # 64 bits, equal for prompts that begin alike
    prefix_keys: PrefixKeys = ()  # of its prompt
    priority: int = PRIORITY_STANDARD  # of the wire's enum
    number: int = 0  # of the request; round-robin goes by it

    @property
    def tokens(self) -> int:
        """Prompt and output at most."""
        return self.prompt_tokens + self.max_tokens

    @property
    def damage(self) -> float:
        """The weight of time that it takes from others."""
        return DAMAGE_WEIGHT.get(self.priority, 1.0)


def compute_weights(demand: Demand) -> Weights:
    """For all tokens of the prompt: weights of CHUNK, TOKEN, KTOKEN."""
    tokens = demand.prompt_tokens
    return -(-tokens // CHUNK_TOKENS), tokens, tokens * tokens / 2e3


def queue_weights(demand: Demand) -> Weights:
    """For the queued tokens, at the context length of this prompt: weights of QUEUED_TOKEN, QUEUED_KTOKEN, PENALTY."""
    return 1.0, demand.prompt_tokens / 2e3, 1.0


def all_weights(demand: Demand, output_tokens: float) -> Floats:
    """The weights of LOCAL, REMOTE and OWN in one vector [18]: making a vector takes longer than using it."""
    chunks, tokens, pairs = compute_weights(demand)
    once, damage = LOCAL_MARGIN, demand.damage
    each = ITL_WEIGHT * damage
    local = each * chunks, each * tokens, each * pairs, once * chunks, once * tokens, once * pairs
    # The request's own steps, and what they add to those of the others (for half an answer on average).
    most = demand.max_tokens
    kv = tokens + most
    steps = ITL_WEIGHT * (most if most < output_tokens else output_tokens)
    others = 0.5 * steps * damage
    own = 1.0, steps, steps, steps * kv, others, others * kv
    return np.frombuffer(PACK_WEIGHTS(*local, chunks, tokens, pairs, *queue_weights(demand), *own))


def own_ms(weights: Floats, workers: WorkerColumns) -> Costs:
    """What the request's steps cost on each decode worker."""
    return as_costs(weights[OWN_WEIGHTS].dot(workers.own))


def remote_ms(weights: Floats, demand: Demand, workers: WorkerColumns, cached: Cached) -> Costs:
    """What the prompt costs on each prefill worker: the queue, and the tokens that are not cached."""
    costs = as_costs(weights[REMOTE_WEIGHTS].dot(workers.remote))
    save(costs, demand, workers, cached)
    return costs


def local_ms(weights: Floats, demand: Demand, workers: WorkerColumns, cached: Cached) -> Costs:
    """What the prompt costs on each decode worker that computes it itself, with what others lose by it."""
    costs = as_costs(weights[LOCAL_WEIGHTS].dot(workers.local))
    save(costs, demand, workers, cached, LOCAL_MARGIN, ITL_WEIGHT * demand.damage)
    return costs


def cached_tokens(workers: WorkerColumns, demand: Demand) -> Cached:
    """Tokens of the prompt that each worker is predicted to have. The last token is always computed."""
    cached: Cached = workers.prefixes.match(demand.prefix_keys)
    most, trust = demand.prompt_tokens - 1, workers.prefix_trust
    for row, tokens in cached.items():
        predicted = tokens * trust[row]
        if predicted != tokens or predicted > most:
            cached[row] = predicted if predicted < most else most
    return cached


def save(
    costs: Costs, demand: Demand, workers: WorkerColumns, cached: Cached, once: float = 1.0, each: float = 0.0
) -> None:
    """Subtracts what need not be computed from the costs: `once`, and `each` times for every request of the row."""
    tokens = demand.prompt_tokens
    chunks = -(-tokens // CHUNK_TOKENS)
    if isinstance(costs, list) or len(cached) <= FEW_ROWS:
        compute, requests = workers.compute, workers.requests
        for row, tokens_here in cached.items():
            chunk, token, ktoken = compute[row]
            saved = (chunks + (tokens_here - tokens) // CHUNK_TOKENS) * chunk
            saved += tokens_here * (token + tokens_here / 2e3 * ktoken)
            costs[row] -= (once + each * requests.item(row)) * saved
        return
    rows, tokens_here = np.fromiter(cached, dtype=np.int64), np.fromiter(cached.values(), dtype=np.float64)
    chunk, token, ktoken = workers.terms[COMPUTE, rows]
    saved = (chunks + (tokens_here - tokens) // CHUNK_TOKENS) * chunk
    saved += tokens_here * (token + tokens_here / 2e3 * ktoken)
    costs[rows] -= (once + each * workers.requests[rows]) * saved


def wait_ms(table: RoutingTable, demand: Demand) -> Floats | None:
    """The wait for pages on the decode workers; None where there is none anywhere.

    Pages come back as the running requests end: all of them about once in an answer's time.
    """
    workers = table.decode
    if workers.room.item(workers.room.argmin()) >= demand.tokens:
        return None
    used = (workers.pages_total - workers.pages_free) * workers.page_tokens
    missing = np.maximum(0.0, demand.tokens - workers.room) / np.maximum(used, 1.0)
    answer_ms = min(demand.max_tokens, table.output_tokens) * workers.terms[Term.STEP]
    return np.minimum(missing, 8.0) * answer_ms


def exposed_ms(
    demand: Demand, table: RoutingTable, decode_cached: float | Floats, links: Floats, hidden_ms: Floats | float
) -> Floats:
    """The transfer of the pages that the decode worker does not have, less what the compute hides of it."""
    sent = (demand.prompt_tokens - decode_cached) * table.wire_bytes(demand.codec)
    return np.maximum(0.0, sent / links - hidden_ms)


def always_hidden(demand: Demand, table: RoutingTable, hidden_ms: float) -> bool:
    """Whether the compute hides the transfer to every decode worker, as it usually does."""
    return demand.prompt_tokens * table.wire_bytes(demand.codec) <= hidden_ms * table.decode.slowest_link


def dense(cached: Cached, rows: int) -> Floats:
    """The tokens that are cached in each of so many rows, [rows]."""
    tokens = np.zeros(rows)
    tokens[list(cached)] = list(cached.values())
    return tokens
