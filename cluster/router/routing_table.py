"""All that the router reads: the workers that take work, and what the gateway measured of requests. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .prefixes import KEY_BYTES, MAX_KEYS
from .worker_columns import RECENT, Floats, WorkerColumns

PRIOR_OUTPUT = 128.0  # tokens of an answer
PRIOR_BYTES = 10_000.0  # of KV on the wire, per token

Limit = tuple[int, int]  # the longest prompt, and prompt and output together, in tokens; (0, 0): nothing
Layout = tuple[int, str]  # tokens of a page, and the hash of the codec's parameters


class CodecSupport(NamedTuple):
    """Who supports one codec, and in which layout: workers of the same layout may be paired."""

    layouts: tuple[Layout, ...]
    prefill: NDArray[np.int64]  # index of each row's layout, -1 for none
    decode: NDArray[np.int64]
    fits_all: int  # a request of so many tokens fits on every worker, and all may be paired; 0 where not all may
    paired_limit: Limit  # where a prefill worker computes the prompt
    local_limit: Limit  # where the decode worker does


class RoutingTable:
    """The workers of both roles, and what the gateway measured of requests on its own."""

    def __init__(self) -> None:
        self.prefill = WorkerColumns()
        self.decode = WorkerColumns(self.prefill)
        self.output_tokens = PRIOR_OUTPUT  # of an answer, on average
        self._wire_bytes: dict[str, float] = {}  # by codec: KV on the wire for each token
        self._support: dict[str, CodecSupport] = {}
        self._codecs: tuple[str, ...] | None = None
        self._versions = (0, 0)
        self._links: dict[tuple[str, int], tuple[Mapping[str, float], Floats]] = {}

    @property
    def measured(self) -> bool:
        """Whether estimated times rest on what workers measured, and not on priors."""
        prompts, steps = self.decode.measured
        return steps and (prompts or self.prefill.measured[0])

    def wire_bytes(self, codec: str) -> float:
        """Bytes of KV on the wire for each token."""
        return self._wire_bytes.get(codec, PRIOR_BYTES)

    def record_transfer(self, codec: str, tokens: int, wire_bytes: int) -> None:
        """Takes in the size of a transfer."""
        if tokens > 0:
            before = self._wire_bytes.get(codec, wire_bytes / tokens)
            self._wire_bytes[codec] = before + RECENT * (wire_bytes / tokens - before)

    def record_answer(self, tokens: int) -> None:
        """Takes in the length of an answer that has ended."""
        self.output_tokens += RECENT * (tokens - self.output_tokens)

    def codec_support(self, codec: str) -> CodecSupport:
        """Which workers support a codec."""
        self._invalidate()
        support = self._support.get(codec)
        if support is None:
            layouts: dict[Layout, int] = {}
            decode, prefill = (_layouts(workers, codec, layouts) for workers in (self.decode, self.prefill))
            fits = 0
            everybody = (decode >= 0).sum() == len(self.decode) and (prefill >= 0).sum() == len(self.prefill)
            if len(layouts) == 1 and len(self.decode) and everybody:
                fits = min(load.capacity_tokens for workers in (self.decode, self.prefill) for load in workers)
            limits = self._limits(prefill, decode)
            support = self._support[codec] = CodecSupport(tuple(layouts), prefill, decode, fits, *limits)
        return support

    def _limits(self, prefill: NDArray[np.int64], decode: NDArray[np.int64]) -> tuple[Limit, Limit]:
        """The limits of paired and of local computation."""
        paired, local = (0, 0), (0, 0)
        for row in np.flatnonzero(decode >= 0):
            capacity = int(self.decode.capacity[row])
            partners = self.prefill.capacity[prefill == decode[row]]
            longest = min(int(partners.max()), capacity - 1) if len(partners) else 0
            local = max(local[0], capacity - 1), max(local[1], capacity)
            if longest > 0:
                paired = max(paired[0], longest), max(paired[1], capacity)
        return paired, local

    @property
    def prefix_bytes(self) -> tuple[int, int]:
        """Memory that remembered prefixes take, of both roles, and the most that they may take."""
        keys = self.prefill.prefixes.key_count + self.decode.prefixes.key_count
        return keys * KEY_BYTES, 2 * MAX_KEYS * KEY_BYTES

    def links(self, decode: int) -> Floats:
        """Bytes per ms from each prefill worker to the decode worker of a row, [prefill rows]."""
        address, measured = self.decode.addresses[decode], self.decode.loads[self.decode.addresses[decode]].links
        key = (address, self.prefill.version)
        known = self._links.get(key)
        if known is None or known[0] is not measured:
            rates = np.full(len(self.prefill.addresses), self.decode.link[decode])
            for peer, rate in measured.items():
                if peer in self.prefill.row_of:
                    rates[self.prefill.row_of[peer]] = rate
            self._links[key] = known = (measured, rates)
        return known[1]

    @property
    def codecs(self) -> tuple[str, ...]:
        """All codecs of the decode workers, sorted."""
        self._invalidate()
        if self._codecs is None:
            self._codecs = tuple(sorted({name for load in self.decode for name in load.codecs}))
        return self._codecs

    def _invalidate(self) -> None:
        """Drops what was computed for another set of workers."""
        versions = (self.prefill.version, self.decode.version)
        if self._versions != versions:
            self._support.clear()
            self._links.clear()
            self._codecs, self._versions = None, versions


def _layouts(workers: WorkerColumns, codec: str, layouts: dict[Layout, int]) -> NDArray[np.int64]:
    """The index of each row's layout, -1 where it has none; new layouts are added to `layouts`."""
    indices = np.full(len(workers.addresses), -1)
    for address, load in workers.loads.items():
        params = load.codecs.get(codec)
        if params is not None:
            indices[workers.row_of[address]] = layouts.setdefault((load.page_tokens, params), len(layouts))
    return indices
