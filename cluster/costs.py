"""What a request costs on each worker, in milliseconds: pure functions of the board's columns.

    remote = wait for pages + steps + queue at the prefill worker + compute of uncached tokens
             + transfer that the compute does not hide
    local  = wait for pages + steps + compute of tokens not held + what that takes from running requests

`steps` prices the decode worker: the time of the request's own steps, and what it adds to those of the others, for the
tokens that an answer has on average. A millisecond of ITL is worth ITL_WEIGHT milliseconds of TTFT.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from .board import COMPUTE, Board, Floats, Pool, Term
from .prefixes import FEW, Steps

ITL_WEIGHT = 0.05
LOCAL_MARGIN = 1.5  # the decode worker's time is dearer: requests that come next will want it
CHUNK_TOKENS = 512  # of a prefill chunk, for its fixed cost
# What the damage to others counts: somebody who waits may take more from those who do not.
DAMAGE_OF: dict[int, float] = {PRIORITY_INTERACTIVE: 0.5, PRIORITY_BATCH: 2.0}

Weights = tuple[float, ...]  # of terms that stand next to each other
Cached = dict[int, float]  # tokens of a prompt that are believed to be cached, by row; only rows that have any
Real = TypeVar("Real", float, Floats)


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


def step_weights(demand: Demand, output_tokens: float) -> Weights:
    """The request's own steps, and what they add to those of the others (for half an answer on average): of OWN."""
    most, kv = demand.max_tokens, demand.tokens
    own = ITL_WEIGHT * (most if most < output_tokens else output_tokens)
    others = 0.5 * own * demand.damage
    return 1.0, own, own, own * kv, others, others * kv


def own_ms(demand: Demand, pool: Pool, output_tokens: float) -> Floats:
    """What the request's steps cost on each decode worker, [rows]."""
    return np.array(step_weights(demand, output_tokens)).dot(pool.own)


def remote_ms(demand: Demand, pool: Pool, cached: Cached) -> Floats:
    """What the prompt costs on each prefill worker: the queue, and the tokens that are not cached, [rows]."""
    costs = np.array((*compute_weights(demand), *queue_weights(demand))).dot(pool.remote)
    save(costs, demand, pool, cached)
    return costs


def local_ms(demand: Demand, pool: Pool, held: Cached) -> Floats:
    """What it costs on each decode worker if that computes the prompt itself, and what others lose by it, [rows]."""
    chunk, token, ktoken = compute_weights(demand)
    once, each = LOCAL_MARGIN, ITL_WEIGHT * demand.damage
    weights = each * chunk, each * token, each * ktoken, once * chunk, once * token, once * ktoken
    costs = np.array(weights).dot(pool.local)
    save(costs, demand, pool, held, once, each)
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


def saved_ms(prompt_tokens: int, cached: Real, chunk: Real, token: Real, ktoken: Real) -> Real:
    """What computing a prompt costs less where so much of it is cached; for one worker or for several."""
    chunks = -(-prompt_tokens // CHUNK_TOKENS) + (cached - prompt_tokens) // CHUNK_TOKENS
    return chunks * chunk + cached * token + cached * cached / 2e3 * ktoken


def save(costs: Floats, demand: Demand, pool: Pool, cached: Cached, once: float = 1.0, each: float = 0.0) -> None:
    """Takes what is saved from the costs of all rows: `once`, and `each` times for every request there."""
    tokens = demand.prompt_tokens
    if len(cached) <= FEW:
        for row, there in cached.items():
            chunk, token, ktoken = pool.compute[row]
            saved = saved_ms(tokens, there, chunk, token, ktoken)
            costs[row] -= (once + each * pool.requests.item(row)) * saved
        return
    rows, there = np.fromiter(cached, dtype=np.int64), np.fromiter(cached.values(), dtype=np.float64)
    saved = saved_ms(tokens, there, *pool.terms[COMPUTE, rows])
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
