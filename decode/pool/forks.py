"""What answers to one prompt share beside its final pages: the raw end of the prompt, and the tokens drawn after it.

The first answer leaves them when its prompt is complete; each of the others then holds the same final pages, has a copy
of the raw end in pages of its own, and begins with its own first token. So its numbers are those of the first one, and
nothing of the prompt is computed or sent again.

Letters of tensor shapes: T tokens, H KV heads, D head dimension.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...kvtransfer.page import Section
from ...model.sampling import SampledToken
from ...proto.sampling import MAX_SEED, Sampling, fork_sampling
from .base import KvPool, PooledSequence, final_pages

FORK_BYTES = 64 << 20  # in host memory, of all that is kept for others


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Of one prompt, for the answers that follow its first one."""

    prompt: Sequence[int]
    sampling: Sampling  # of the first answer
    codec: str
    start: int  # tokens of final pages; the others are in `raw`
    raw: tuple[tuple[Tensor, Tensor], ...]  # keys and values [T, H, D] of each layer, in host memory
    drawn: tuple[SampledToken, ...]  # first tokens of the answers that follow

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.raw)

    def first_token(self, sampling: Sampling) -> SampledToken | None:
        """Of the answer with this sampling; None where it does not follow the first one."""
        number = (sampling.seed - self.sampling.seed) & MAX_SEED
        if not 1 <= number <= len(self.drawn) or fork_sampling(self.sampling, number) != sampling:
            return None
        return self.drawn[number - 1]


class Forks:
    """What is kept, by the request that left it; the oldest make room. The engine thread alone uses it."""

    def __init__(self, most_bytes: int = FORK_BYTES) -> None:
        self._most = most_bytes
        self._forks: OrderedDict[str, tuple[Fork, int]] = OrderedDict()  # with how many have not taken theirs
        self.nbytes = 0

    def add(self, request_id: str, fork: Fork) -> None:
        """Keeps a fork, if it has room with no other at all."""
        if request_id in self._forks or not fork.drawn or fork.nbytes > self._most:
            return
        self._forks[request_id] = (fork, len(fork.drawn))
        self.nbytes += fork.nbytes
        while self.nbytes > self._most:
            _, (oldest, _) = self._forks.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def take(self, request_id: str) -> Fork | None:
        """What a request left, for one of those that follow; the last one has it for itself."""
        found = self._forks.pop(request_id, None)
        if found is None:
            return None
        fork, left = found
        if left > 1:
            self._forks[request_id] = (fork, left - 1)
        else:
            self.nbytes -= fork.nbytes
        return fork


class ForkedSequence(PooledSequence, Protocol):
    """What this asks of a request."""

    prompt: list[int]
    sampling: Sampling
    request_id: str
    forks: int
    fork_of: str
    fork: Fork | None
    first: SampledToken | None


class ForkedPrompts:
    """Keeps what a request leaves for those that follow, and gives it to them. The engine thread alone uses it."""

    def __init__(self, pool: KvPool, layers: int, counters: Counter[str]) -> None:
        self._pool, self._layers, self._counters = pool, layers, counters
        self._forks = Forks()

    @property
    def nbytes(self) -> int:
        """Kept, in host memory. From any thread."""
        return self._forks.nbytes

    def keep(self, sequence: ForkedSequence, drawn: tuple[SampledToken, ...]) -> None:
        """The prompt of a request is complete, and nothing of its output is stored yet."""
        if not sequence.forks:
            return
        end, page_tokens = len(sequence.prompt), self._pool.page_tokens
        start = final_pages(end, page_tokens, sequence.codec.packs) * page_tokens
        pages = self._pool.step_pages(sequence, end)
        read = [self._pool.read_raw(pages, start, end, layer) for layer in range(self._layers if start < end else 0)]
        fork = Fork(
            prompt=tuple(sequence.prompt),
            sampling=sequence.sampling,
            codec=sequence.codec.name,
            start=start,
            raw=tuple((keys.to("cpu", copy=True), values.to("cpu", copy=True)) for keys, values in read),
            drawn=drawn,
        )
        self._forks.add(sequence.request_id, fork)

    def follow(self, sequence: ForkedSequence) -> None:
        """Before a request that follows another one gets its pages: these are all final pages of its prompt then."""
        fork = self._forks.take(sequence.fork_of)
        if fork is None or list(fork.prompt) != sequence.prompt or fork.codec != sequence.codec.name:
            return
        if fork.first_token(sequence.sampling) is not None:
            sequence.fork = fork

    def begin(self, sequence: ForkedSequence) -> None:
        """Once it has its pages: where the final ones were all found, it needs nothing more of its prompt."""
        fork, sequence.fork = sequence.fork, None
        if fork is None or sequence.cached_tokens != fork.start:
            return
        end = len(fork.prompt)
        pages = self._pool.step_pages(sequence, end)
        for layer, (keys, values) in enumerate(fork.raw):
            section = Section(fork.start, end - fork.start, packed=False)
            self._pool.write_section(pages, layer, section, keys, values)
        sequence.first = fork.first_token(sequence.sampling)
        self._counters["forked_prompts"] += 1
