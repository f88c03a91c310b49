"""What a request costs on each worker, in milliseconds: pure functions of the board's columns.

    remote = wait for pages + steps + queue at the prefill worker + compute of uncached tokens
             + transfer that the compute does not hide
    local  = wait for pages + steps + compute of tokens not held + what that takes from running requests

`steps` prices the decode worker: the time of the request's own steps, and what it adds to those of the others, for the
tokens that an answer has on average. A millisecond of ITL is worth ITL_WEIGHT milliseconds of TTFT.
"""

from dataclasses import dataclass
from struct import Struct

import numpy as np

from ...proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from .cost_vectors import Costs, plain
from .prefixes import FEW, Steps
from .routing_table import Board
from .worker_columns import COMPUTE, Floats, Pool, Term

ITL_WEIGHT = 0.05
LOCAL_MARGIN = 1.5  # the decode worker's time is dearer: requests that come next will want it
CHUNK_TOKENS = 512  # of a prefill chunk, for its fixed cost
OF_LOCAL, OF_REMOTE, OF_OWN = slice(0, 6), slice(6, 12), slice(12, 18)  # of `all_weights`
PACKED = Struct("18d").pack  # twice as fast as making a vector of a tuple
# What the damage to others counts: somebody who waits may take more from those who do not.
DAMAGE_OF: dict[int, float] = {PRIORITY_INTERACTIVE: 0.5, PRIORITY_BATCH: 2.0}

Weights = tuple[float, ...]  # of terms that stand next to each other
Cached = dict[int, float]  # tokens of a prompt that are believed to be cached, by row; only rows that have any


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What the router knows of a request."""

    prompt_tokens: int
    max_tokens: int
    codec: str
    affinity: int = 0  # 64 bits, equal for prompts that begin alike
    steps: Steps = ()  # addresses of its pages
    priority: int = PRIORITY_STANDARD  # of the wire's enum
    number: int = 0  # counts requests; round-robin goes by it

    @property
    def tokens(self) -> int:
        """All it can come to hold."""
        return self.prompt_tokens + self.max_tokens

    @property
    def damage(self) -> float:
        """What it counts to take time from others."""
        return DAMAGE_OF.get(self.priority, 1.0)


def compute_weights(demand: Demand) -> Weights:
    """All tokens of the prompt: of CHUNK, TOKEN, KTOKEN."""
    tokens = demand.prompt_tokens
    return -(-tokens // CHUNK_TOKENS), tokens, tokens * tokens / 2e3


def queue_weights(demand: Demand) -> Weights:
    """The tokens ahead, at the context length of this prompt: of QUEUED_TOKEN, QUEUED_KTOKEN; and PENALTY."""
    return 1.0, demand.prompt_tokens / 2e3, 1.0


def all_weights(demand: Demand, output_tokens: float) -> Floats:
    """Of LOCAL, REMOTE and OWN, one after the other: a vector for all, as making it takes longer than using it."""
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
    return np.frombuffer(PACKED(*local, chunks, tokens, pairs, *queue_weights(demand), *own))


def own_ms(weights: Floats, pool: Pool) -> Costs:
    """What the request's steps cost on each decode worker."""
    return plain(weights[OF_OWN].dot(pool.own))


def remote_ms(weights: Floats, demand: Demand, pool: Pool, cached: Cached) -> Costs:
    """What the prompt costs on each prefill worker: the queue, and the tokens that are not cached."""
    costs = plain(weights[OF_REMOTE].dot(pool.remote))
    save(costs, demand, pool, cached)
    return costs


def local_ms(weights: Floats, demand: Demand, pool: Pool, held: Cached) -> Costs:
    """What it costs on each decode worker if that computes the prompt itself, and what others lose by it."""
    costs = plain(weights[OF_LOCAL].dot(pool.local))
    save(costs, demand, pool, held, LOCAL_MARGIN, ITL_WEIGHT * demand.damage)
    return costs


def cached_tokens(pool: Pool, demand: Demand) -> Cached:
    """Tokens of the prompt that each worker is believed to have. The last token is always computed."""
    cached: Cached = pool.prefixes.match(demand.steps)
    most, trust = demand.prompt_tokens - 1, pool.trust
    for row, tokens in cached.items():
        believed = tokens * trust[row]
        if believed != tokens or believed > most:
            cached[row] = believed if believed < most else most
    return cached


def save(costs: Costs, demand: Demand, pool: Pool, cached: Cached, once: float = 1.0, each: float = 0.0) -> None:
    """Takes what need not be computed from the costs of all rows: `once`, and `each` times for every request there."""
    tokens = demand.prompt_tokens
    chunks = -(-tokens // CHUNK_TOKENS)
    if isinstance(costs, list) or len(cached) <= FEW:
        compute, requests = pool.compute, pool.requests
        for row, there in cached.items():
            chunk, token, ktoken = compute[row]
            saved = (chunks + (there - tokens) // CHUNK_TOKENS) * chunk + there * (token + there / 2e3 * ktoken)
            costs[row] -= (once + each * requests.item(row)) * saved
        return
    rows, there = np.fromiter(cached, dtype=np.int64), np.fromiter(cached.values(), dtype=np.float64)
    chunk, token, ktoken = pool.terms[COMPUTE, rows]
    saved = (chunks + (there - tokens) // CHUNK_TOKENS) * chunk + there * (token + there / 2e3 * ktoken)
    costs[rows] -= (once + each * pool.requests[rows]) * saved


def wait_ms(board: Board, demand: Demand) -> Floats | None:
    """The wait for pages on the decode workers; None where there is none anywhere.

    Pages come back as the running requests end: all of them about once in an answer's time.
    """
    pool = board.decode
    if pool.room.item(pool.room.argmin()) >= demand.tokens:
        return None
    used = (pool.pages_total - pool.pages_free) * pool.page_tokens
    missing = np.maximum(0.0, demand.tokens - pool.room) / np.maximum(used, 1.0)
    answer_ms = min(demand.max_tokens, board.output_tokens) * pool.terms[Term.STEP]
    return np.minimum(missing, 8.0) * answer_ms


def exposed_ms(demand: Demand, board: Board, held: float | Floats, links: Floats, hidden_ms: Floats | float) -> Floats:
    """The transfer of the pages that the decode worker does not hold, less what the compute hides of it."""
    sent = (demand.prompt_tokens - held) * board.wire_bytes(demand.codec)
    return np.maximum(0.0, sent / links - hidden_ms)


def always_hidden(demand: Demand, board: Board, hidden_ms: float) -> bool:
    """Whether the compute hides the transfer to every decode worker, as is usual."""
    return demand.prompt_tokens * board.wire_bytes(demand.codec) <= hidden_ms * board.decode.slowest_link


def column(cached: Cached, rows: int) -> Floats:
    """What is cached in each of so many rows, [rows]."""
    tokens = np.zeros(rows)
    tokens[list(cached)] = list(cached.values())
    return tokens
