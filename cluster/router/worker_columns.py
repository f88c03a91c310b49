"""The workers of one role, as columns of numbers. Pure: no I/O, no clock.

Their owner updates them with each report and each placement; a decision then costs a few vector operations, however
many workers there are. A worker keeps its row until it is removed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .prefixes import PrefixIndex, PrefixKeys

Floats = NDArray[np.float64]
Three = tuple[float, float, float]


class PrefillTime(NamedTuple):
    """Milliseconds of a chunk: ms + tokens * (ms_token + ms_ktoken * context / 1000)."""

    ms: float
    ms_token: float
    ms_ktoken: float


class StepTime(NamedTuple):
    """Milliseconds of a decode step: ms + sequences * ms_sequence + pages in use * ms_page."""

    ms: float
    ms_sequence: float
    ms_page: float


# Of a worker that measured nothing yet, where no other did either: a small model on a few cores.
PRIOR_PREFILL = PrefillTime(5.0, 0.5, 0.01)
PRIOR_STEP = StepTime(5.0, 0.5, 0.01)
PRIOR_LINK = 1e6  # bytes per ms
LEAST_TRUST = 0.05  # in the prefixes that a worker was given: it may begin to keep them
RECENT = 0.05  # weight of the newest figure in an average


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
    prefill: PrefillTime | None = None  # None: not measured
    step: StepTime | None = None
    links: Mapping[str, float] = field(default_factory=dict)  # decode: bytes per ms from prefill workers' addresses
    suspect: bool = False  # takes work only where no other can

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the largest request that fits when nothing else runs."""
        return self.pages_total * self.page_tokens


class Term(IntEnum):
    """What costs are linear in: the columns of `WorkerColumns.terms`. A cost is a weighted sum of them, for all workers
    at once.

    The order makes the terms of each cost consecutive: LOCAL, REMOTE, OWN.
    """

    ALL_CHUNK = 0  # CHUNK, TOKEN, KTOKEN times the worker's requests: what all of them lose by it
    ALL_TOKEN = 1
    ALL_KTOKEN = 2
    CHUNK = 3  # ms of a prefill chunk
    TOKEN = 4  # ms of a token of it
    KTOKEN = 5  # ms that 1,000 tokens of context add to a token
    QUEUED_TOKEN = 6  # the same for all queued tokens
    QUEUED_KTOKEN = 7
    PENALTY = 8  # 0, SUSPECT, or EXCLUDED for a free row
    STEP = 9  # ms of a decode step now
    SEQUENCE = 10  # ms that one more request adds to it
    KV = 11  # ms that one more token of KV adds to it
    ALL_SEQUENCE = 12  # for all requests together
    ALL_KV = 13


COMPUTE = slice(Term.CHUNK, Term.KTOKEN + 1)
QUEUE = slice(Term.QUEUED_TOKEN, Term.PENALTY + 1)
LOCAL = slice(Term.ALL_CHUNK, Term.KTOKEN + 1)  # a decode worker computes a prompt: damage to others, compute
REMOTE = slice(Term.CHUNK, Term.PENALTY + 1)  # a prefill worker does: compute, queue
OWN = slice(Term.PENALTY, Term.ALL_KV + 1)  # steps of a decode worker
SUSPECT, EXCLUDED = 1e9, 1e15  # penalties; finite, so that they may be weighted with zero


class WorkerColumns:
    """The workers of one role, one row each. A worker keeps its row until it is removed."""

    _COLUMNS = (
        "pages_free",
        "queued",
        "requests",
        "room",
        "capacity",
        "page_tokens",
        "pages_total",
        "link",
        "min_link",
    )
    capacity: Floats  # tokens of the largest request
    page_tokens: Floats
    pages_total: Floats
    pages_free: Floats
    queued: Floats  # tokens
    requests: Floats
    room: Floats  # tokens that are free and that nobody waits for
    link: Floats  # bytes per ms from a prefill worker, on average
    min_link: Floats  # bytes per ms from the one with the slowest link
    terms: Floats  # [Term, rows]
    local: Floats  # the terms of LOCAL, REMOTE and OWN
    remote: Floats
    own: Floats

    def __init__(self, peers: "WorkerColumns | None" = None) -> None:
        """`peers`: the other role, whose prefill times are used where no worker of this one has measured any."""
        self._peers = peers
        self.addresses: list[str] = []  # by row; "" for a free one
        self.loads: dict[str, WorkerLoad] = {}
        self.row_of: dict[str, int] = {}  # by address
        self.prefixes = PrefixIndex()
        self.seeds: list[int] = []  # by row: 64 bits that break ties
        self.prefix_trust: list[float] = []  # by row: the share of predicted prefix hits that were hits
        self.compute: list[PrefillTime] = []  # by row
        self.version = 0  # changes with the set of workers, and with what they can be paired with
        self.slowest_link = PRIOR_LINK
        self._rows: dict[int, _Row] = {}
        self._prefill: PrefillTime | None = None  # average of those that measured
        self._step: StepTime | None = None
        self._resize(0)

    def __len__(self) -> int:
        return len(self.row_of)

    def __iter__(self) -> Iterator[WorkerLoad]:
        return iter(self.loads.values())

    def update(self, load: WorkerLoad) -> None:
        """Adds a worker or replaces what is known of it."""
        before = self.loads.get(load.address)
        if before is None:
            self._add(load.address)
        fixed = (load.codecs, load.page_tokens, load.pages_total)
        if before is None or (before.codecs, before.page_tokens, before.pages_total) != fixed:
            self.version += 1
        self.loads[load.address] = load
        row = self.row_of[load.address]
        self._columns[4:7, row] = (load.capacity_tokens, load.page_tokens, load.pages_total)
        self.link[row] = _mean_link(load.links)
        self.min_link[row] = min(load.links.values(), default=PRIOR_LINK)
        self.slowest_link = self.min_link.item(self.min_link.argmin())
        self.compute[row], step = self._rates(load)
        self._rows[row] = numbers = _Row(load, SUSPECT if load.suspect else 0.0, self.compute[row], step)
        self._write(row, numbers)

    def remove(self, address: str) -> None:
        """Forgets a worker and what it was given."""
        row = self.row_of.pop(address, None)
        if row is not None:
            del self.loads[address], self._rows[row]
            self.addresses[row] = ""
            self.terms[Term.PENALTY, row], self.room[row] = EXCLUDED, np.inf
            self.link[row] = self.min_link[row] = PRIOR_LINK
            self.prefixes.forget(row)
            self.version += 1

    def add_placement(self, row: int, *, tokens: float, pages: float, prefix_keys: PrefixKeys) -> None:
        """Counts a request that was placed on a worker until a report shows it."""
        numbers = self._rows[row]
        numbers.queued += tokens
        numbers.free = max(0.0, numbers.free - pages)
        numbers.requests += 1
        self._write(row, numbers)
        self.prefixes.remember(row, prefix_keys)

    def _write(self, row: int, numbers: "_Row") -> None:
        """Writes a row into the columns."""
        free_tokens = numbers.free * numbers.page_tokens
        self._columns[:4, row] = (numbers.free, numbers.queued, numbers.requests, free_tokens - numbers.queued)
        self.terms[:, row] = numbers.terms(numbers.tokens - free_tokens)

    def update_prefix_trust(self, address: str, predicted: float, found: float) -> None:
        """Takes in how many tokens of a prompt a worker had cached, of so many that were predicted."""
        row = self.row_of.get(address)
        if row is not None and predicted > 0:
            trust = self.prefix_trust[row]
            given = predicted / trust
            self.prefix_trust[row] = max(LEAST_TRUST, trust + 0.2 * (min(1.0, found / given) - trust))

    @property
    def measured(self) -> tuple[bool, bool]:
        """Whether a worker here has measured how long prompts take, and decode steps."""
        return self._prefill is not None, self._step is not None

    @property
    def typical_prefill(self) -> PrefillTime:
        """The average of the workers that measured it, here or among the peers."""
        return self._prefill or (self._peers.typical_prefill if self._peers else PRIOR_PREFILL)

    def _rates(self, load: WorkerLoad) -> tuple[PrefillTime, StepTime]:
        """What the worker measured, else the average of those that did."""
        if load.prefill is not None:
            self._prefill = PrefillTime(*_moving_average(self._prefill or load.prefill, load.prefill))
        if load.step is not None:
            self._step = StepTime(*_moving_average(self._step or load.step, load.step))
        return load.prefill or self.typical_prefill, load.step or self._step or PRIOR_STEP

    def _add(self, address: str) -> None:
        if "" not in self.addresses:
            self._resize(max(8, 2 * len(self.addresses)))
        row = self.addresses.index("")
        self.addresses[row], self.row_of[address] = address, row
        self.seeds[row] = int.from_bytes(blake2b(address.encode(), digest_size=8).digest(), "big")
        self.prefix_trust[row] = 1.0

    def _resize(self, rows: int) -> None:
        before = len(self.addresses)
        more = rows - before
        columns, terms = np.ones((len(self._COLUMNS), rows)), np.zeros((len(Term), rows))
        for name in ("link", "min_link"):
            columns[self._COLUMNS.index(name)] = PRIOR_LINK
        columns[self._COLUMNS.index("room")] = np.inf
        terms[Term.PENALTY] = EXCLUDED
        if before:
            columns[:, :before], terms[:, :before] = self._columns, self.terms
        self._columns, self.terms = columns, terms
        for index, name in enumerate(self._COLUMNS):
            setattr(self, name, columns[index])
        self.local, self.remote, self.own = terms[LOCAL], terms[REMOTE], terms[OWN]
        self.addresses += [""] * more
        self.seeds += [0] * more
        self.prefix_trust += [1.0] * more
        self.compute += [PRIOR_PREFILL] * more


class _Row:
    """One row in plain numbers: a report, and the placements since."""

    __slots__ = ("_kv", "_penalty", "_prefill", "_step", "free", "page_tokens", "queued", "requests", "tokens")

    def __init__(self, load: WorkerLoad, penalty: float, prefill: PrefillTime, step: StepTime) -> None:
        self._penalty, self._prefill, self._step = penalty, prefill, step
        self._kv = step.ms_page / load.page_tokens
        self.free, self.queued, self.requests = float(load.pages_free), float(load.queued_tokens), float(load.requests)
        self.page_tokens, self.tokens = load.page_tokens, load.capacity_tokens

    def terms(self, used: float) -> tuple[float, ...]:
        """One value for each Term, with `used` tokens of KV in use."""
        chunk, token, ktoken = self._prefill
        base, sequence, _ = self._step
        queued, requests, kv = self.queued, self.requests, self._kv
        return (
            *(requests * chunk, requests * token, requests * ktoken, chunk, token, ktoken),
            *(queued * token, queued * ktoken, self._penalty),
            *(base + requests * sequence + used * kv, sequence, kv, requests * sequence, requests * kv),
        )


def _moving_average(average: Three, newest: Three) -> Three:
    a, b, c = average
    x, y, z = newest
    return a + RECENT * (x - a), b + RECENT * (y - b), c + RECENT * (z - c)


def _mean_link(links: Mapping[str, float]) -> float:
    return len(links) / sum(1 / rate for rate in links.values()) if links else PRIOR_LINK
