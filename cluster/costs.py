"""What a request costs on each worker, in milliseconds: pure functions of the board's columns.

    remote = wait for pages + steps + queue at the prefill worker + compute of uncached tokens
             + transfer that the compute does not hide
    local  = wait for pages + steps + compute of tokens not held + what that takes from running requests

`steps` prices the decode worker: the time of the request's own steps, and what it adds to those of the others, for the
tokens that an answer has on average. A millisecond of ITL is worth ITL_WEIGHT milliseconds of TTFT.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD
from .board import Board, Floats, Pool, Term
from .prefixes import Steps

ITL_WEIGHT = 0.05
LOCAL_MARGIN = 1.5  # the decode worker's time is dearer: requests that come next will want it
CHUNK_TOKENS = 512  # of a prefill chunk, for its fixed cost
# What the damage to others counts: somebody who waits may take more from those who do not.
DAMAGE_OF: dict[int, float] = {PRIORITY_INTERACTIVE: 0.5, PRIORITY_BATCH: 2.0}

Weights = list[float]  # of each Term


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


def queue_weights(demand: Demand) -> Weights:
    """The tokens ahead, at the context length of this prompt, and the penalty of those that are suspect."""
    return _weights(PENALTY=1, QUEUED_TOKEN=1, QUEUED_KTOKEN=demand.prompt_tokens / 2e3)


def compute_weights(demand: Demand) -> Weights:
    """All tokens of the prompt."""
    tokens = demand.prompt_tokens
    return _weights(CHUNK=math.ceil(tokens / CHUNK_TOKENS), TOKEN=tokens, KTOKEN=tokens * tokens / 2e3)


def damage_weights(demand: Demand) -> Weights:
    """What computing the whole prompt on a decode worker takes from the requests there."""
    _, chunk, token, ktoken, *_ = compute_weights(demand)
    weight = ITL_WEIGHT * demand.damage
    return _weights(ALL_CHUNK=weight * chunk, ALL_TOKEN=weight * token, ALL_KTOKEN=weight * ktoken)


def step_weights(demand: Demand, output_tokens: float) -> Weights:
    """The request's own steps, and what they add to those of the others (for half an answer on average)."""
    own = ITL_WEIGHT * min(demand.max_tokens, output_tokens)
    others = 0.5 * own * demand.damage
    kv = demand.tokens
    return _weights(PENALTY=1, STEP=own, SEQUENCE=own, KV=own * kv, ALL_SEQUENCE=others, ALL_KV=others * kv)


def cached_tokens(pool: Pool, demand: Demand) -> Floats | None:
    """Tokens of the prompt that each worker is believed to have, None where nobody has any.

    The last token is always computed.
    """
    matched = pool.prefixes.match(demand.steps, len(pool.addresses)) if demand.steps else None
    return None if matched is None else np.minimum(matched * pool.trust, demand.prompt_tokens - 1)


def saved_ms(pool: Pool, demand: Demand, cached: Floats) -> Floats:
    """What computing the prompt costs less where its beginning is cached."""
    _, chunk, token, ktoken = pool.terms[: Term.KTOKEN + 1]
    whole = math.ceil(demand.prompt_tokens / CHUNK_TOKENS)
    chunks = whole - np.ceil((demand.prompt_tokens - cached) / CHUNK_TOKENS)
    return chunks * chunk + cached * token + cached * cached / 2e3 * ktoken


def wait_ms(board: Board, demand: Demand) -> Floats | None:
    """The wait for pages on the decode workers; None where there is none anywhere.

    Pages come back as the running requests end: all of them about once in an answer's time.
    """
    pool = board.decode
    if pool.room.min() >= demand.tokens:
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


def ties(seeds: NDArray[np.uint64], affinity: int) -> NDArray[np.uint64]:
    """A number for each worker that orders equals, another for each affinity.

    Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998): the order of
    the others stays when a worker goes. Mixed as in SplitMix64 (Steele, Lea and Flood, 2014).
    """
    mixed = seeds ^ np.uint64(affinity)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _weights(**of: float) -> Weights:
    weights = list(_NOTHING)
    for name, weight in of.items():
        weights[_INDEX[name]] = weight
    return weights


_NOTHING = (0.0,) * len(Term)
_INDEX = {term.name: int(term) for term in Term}
