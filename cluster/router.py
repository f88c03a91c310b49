"""Where a request runs: a pure function of a snapshot. No I/O, no clock, no gRPC.

The decode worker is the one that can hold the request with the least damage: enough pages now, the fewest
tokens waiting for admission, the lowest occupancy afterwards. Prefill workers are ordered by the prompt
tokens ahead. Equal loads are told apart by the prompt's beginning, so that requests that begin alike meet in
one worker's cache (rendezvous hashing: Thaler and Ravishankar, "Using name-based mappings to increase hit
rates", 1998).
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..proto.errors import InvalidRequest, Unavailable


@dataclass(frozen=True, kw_only=True)
class WorkerLoad:
    """One worker that takes work: its last report and what was placed on it since."""

    address: str
    codecs: Mapping[str, str]  # name -> parameter hash
    page_tokens: int
    pages_total: int
    pages_free: int  # free or only cached: can be taken at once
    queued_tokens: int = 0  # prefill: prompt tokens not yet computed; decode: not yet admitted
    requests: int = 0  # waiting and running

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the largest request that fits when nothing else runs."""
        return self.pages_total * self.page_tokens


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All workers that take work, at one moment."""

    prefill: tuple[WorkerLoad, ...] = ()
    decode: tuple[WorkerLoad, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the router knows of a request."""

    prompt_tokens: int
    max_tokens: int
    codec: str
    affinity: bytes = b""  # equal for prompts that begin alike


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One decode worker, and prefill workers in the order to try them."""

    decode: str
    prefill: tuple[str, ...]
    page_tokens: int
    codec_hash: str


def may_pair(codec: str, prefill: WorkerLoad, decode: WorkerLoad) -> bool:
    """Whether KV may flow between the two in `codec`: the same parameters and the same pages."""
    ours = prefill.codecs.get(codec)
    return ours is not None and ours == decode.codecs.get(codec) and prefill.page_tokens == decode.page_tokens


def offered_codecs(snapshot: Snapshot) -> tuple[str, ...]:
    """The codecs that at least one pair of workers shares, sorted."""
    names = {name for worker in snapshot.decode for name in worker.codecs}
    return tuple(sorted(name for name in names if any(_pairs(snapshot, name))))


def token_limit(snapshot: Snapshot, codec: str | None = None) -> tuple[int, int]:
    """The longest prompt, and prompt and output together, that some pair can hold; (0, 0) with no pair.

    Over all codecs where `codec` is None.
    """
    names = (codec,) if codec is not None else offered_codecs(snapshot)
    prompt, total = 0, 0
    for name in names:
        for prefill, decode in _pairs(snapshot, name):
            prompt = max(prompt, min(prefill.capacity_tokens, decode.capacity_tokens - 1))
            total = max(total, decode.capacity_tokens)
    return prompt, total


def route(demand: Demand, snapshot: Snapshot, *, avoid: Iterable[str] = ()) -> Placement:
    """Places a request, not on the decode workers in `avoid`.

    Unavailable where no pair of workers is there, InvalidRequest where none could ever hold the request.
    """
    pairs = list(_pairs(snapshot, demand.codec))
    if not pairs:
        raise Unavailable(f"no prefill and decode worker that share codec {demand.codec} are ready")
    need = demand.prompt_tokens + demand.max_tokens
    fitting = [
        (prefill, decode)
        for prefill, decode in pairs
        if demand.prompt_tokens <= prefill.capacity_tokens and need <= decode.capacity_tokens
    ]
    if not fitting:
        prompt, total = token_limit(snapshot, demand.codec)
        raise InvalidRequest(
            f"prompt of {demand.prompt_tokens} and output of {demand.max_tokens} tokens; "
            f"allowed: at most {prompt} and together {total}"
        )
    avoided = set(avoid)
    decodes = {decode.address: decode for _, decode in fitting if decode.address not in avoided}
    if not decodes:
        raise Unavailable("every decode worker that could hold the request failed")
    chosen = min(decodes.values(), key=lambda worker: _decode_cost(demand, worker))
    partners = [prefill for prefill, decode in fitting if decode.address == chosen.address]
    partners.sort(key=lambda worker: (worker.queued_tokens, worker.requests, _tie(demand, worker)))
    return Placement(
        decode=chosen.address,
        prefill=tuple(worker.address for worker in partners),
        page_tokens=chosen.page_tokens,
        codec_hash=chosen.codecs[demand.codec],
    )


def _pairs(snapshot: Snapshot, codec: str) -> Iterable[tuple[WorkerLoad, WorkerLoad]]:
    return (
        (prefill, decode)
        for decode in snapshot.decode
        for prefill in snapshot.prefill
        if may_pair(codec, prefill, decode)
    )


def _decode_cost(demand: Demand, worker: WorkerLoad) -> tuple[int, int, float, int]:
    """Pages that are missing, tokens ahead, occupancy with this request, tie: the smaller the better."""
    pages = math.ceil((demand.prompt_tokens + demand.max_tokens) / worker.page_tokens)
    in_use = worker.pages_total - worker.pages_free
    missing = max(0, pages - worker.pages_free)
    return missing, worker.queued_tokens, (in_use + pages) / worker.pages_total, _tie(demand, worker)


def _tie(demand: Demand, worker: WorkerLoad) -> int:
    digest = hashlib.blake2b(demand.affinity + worker.address.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
