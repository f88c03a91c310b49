"""CUDA graphs of decode steps: what a step launches on a GPU is recorded once, and then started as one.

A decode step launches some hundred kernels of a few microseconds each, and launching one from Python takes longer than
that. A graph has the addresses and shapes of its recording, so that steps are padded to a few fixed shapes. A step of
one new token for each request is filled up to one of these (tokens, pages of the longest request):

1. the host writes token ids and places into the tensors of that shape; those of no request write to a scratch page;
2. the recorded forward reads them, stores KV, attends, and leaves logits in a tensor that is always the same;
3. the first rows of that are the requests'.

Steps with chunks of prompts or of replayed output run as they are, unpadded. The engine thread alone uses this.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ..kernels.fast_paths import compiles_allowed
from ..model.model import Model
from ..worker.step_plan import StepBatch
from .pool.base import KvPool
from .pool.packed import PackedKvPool
from .pool.page_places import PagePlaces, TokenPlace

log = logging.getLogger(__name__)

_LEAST_PAGES = 32
Shape = tuple[int, int]  # tokens, pages
Call = Callable[[], object]
Record = Callable[[Call], Call]
"""Runs a call and records it; what it returns does the same again. RuntimeError where it cannot be recorded."""


def recorder(device: torch.device) -> Record | None:
    """What records for that device; None where nothing is to be gained (a CPU), or nothing compiled is to run."""
    return CudaRecorder(device) if device.type == "cuda" and compiles_allowed() else None


class CudaRecorder:
    """See `Record`. All recordings share memory for what they compute on the way, so that no two may run at once.

    A call may neither wait for the GPU nor copy from the host, and every tensor that it reads or writes and that it
    does not make itself must outlive its recording.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, call: Call) -> Call:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            call()  # compiles kernels and makes constants, neither of which can be done while recording
            graph = torch.cuda.CUDAGraph()
            # Only what this thread does counts: others of the process may use the GPU meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                call()
        return graph.replay


def token_counts(most: int) -> list[int]:
    """How many tokens padded steps have, ascending: at most a third of a large one is for nothing."""
    counts = (1, 2, 4, *range(8, 64, 8), *range(64, most, 32))
    return [*(count for count in counts if count < most), most]


def page_counts(most: int) -> list[int]:
    """How wide their page tables are, ascending: over how many programs attention is split goes by that."""
    counts = [_LEAST_PAGES]
    while counts[-1] < most:
        counts.append(4 * counts[-1])
    return [*counts[:-1], most]


class PaddedSteps:
    """Recorded steps of all shapes, and the tensors that they share."""

    def __init__(self, model: Model, pool: PackedKvPool, *, most_tokens: int) -> None:
        self._model, self._pool, device = model, pool, model.device
        most_pages = min(pool.pages_for(model.context_length), pool.total_pages + 1)  # its first page is raw
        self._tokens, self._pages = token_counts(most_tokens), page_counts(most_pages)
        size, on_gpu = PagePlaces.size(most_tokens, most_pages), device.type == "cuda"
        # Copies to the GPU wait until they are done, so that the host's side may be written again at once.
        self._host_places = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self._host_ids = torch.zeros(most_tokens, dtype=torch.long, pin_memory=on_gpu)
        self._places, self._ids = self._host_places.to(device, copy=True), self._host_ids.to(device, copy=True)
        self._rows = torch.arange(most_tokens, device=device)
        self._logits = torch.empty(most_tokens, model.vocab_size, dtype=torch.float32, device=device)
        self._replays: dict[Shape, Call] = {}

    def record(self, record: Record) -> None:
        """Records steps of every shape. RuntimeError where the model's forward cannot be recorded."""
        began_s = time.monotonic()
        shapes = sorted(product(self._tokens, self._pages), reverse=True)  # the small fit into the memory of the large
        log.info("recording decode steps of %d shapes as CUDA graphs", len(shapes))
        for shape in shapes:
            self._fill(shape, [], [])
            self._replays[shape] = record(partial(self._forward, *shape))
        log.info("recorded decode steps of %d shapes in %.1f s", len(shapes), time.monotonic() - began_s)

    def shape_of(self, batch: StepBatch) -> Shape | None:
        """The least shape that a step fits into; None where it has to run as it is."""
        if any(plan.end - plan.start != 1 for plan in batch.sequences):
            return None
        tokens, pages = len(batch.sequences), self._pool.pages_for(max(plan.end for plan in batch.sequences))
        if tokens > self._tokens[-1] or pages > self._pages[-1]:
            return None
        return self._tokens[bisect_left(self._tokens, tokens)], self._pages[bisect_left(self._pages, pages)]

    def run(self, batch: StepBatch, shape: Shape) -> Tensor:
        """Stores the KV of the tokens; the logits of those that sample, in order, which the next step overwrites."""
        self._fill(shape, [token_id for (token_id,) in batch.token_ids], self._pool.places(batch))
        self._replays[shape]()
        sampled = [row for row, plan in enumerate(batch.sequences) if plan.samples]
        count = len(batch.sequences)
        return self._logits[:count] if len(sampled) == count else self._logits[sampled]

    def _fill(self, shape: Shape, ids: Sequence[int], places: Sequence[TokenPlace]) -> None:
        """Writes what a step of that shape reads."""
        size = PagePlaces.size(*shape)
        PagePlaces.over(self._host_places, *shape).fill(places, self._pool.scratch)
        self._places[:size].copy_(self._host_places[:size])
        self._host_ids[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        self._ids[: len(ids)].copy_(self._host_ids[: len(ids)])

    def _forward(self, tokens: int, pages: int) -> None:
        """What is recorded: from the tensors that `_fill` wrote to the logits, with nothing of the host between."""
        places = PagePlaces.over(self._places, tokens, pages)
        attend = self._pool.attend(places)
        positions = places.lengths_B.long() - 1
        self._logits[:tokens].copy_(self._model.forward(self._ids[:tokens], positions, self._rows[:tokens], attend))


def record_steps(model: Model, pool: KvPool, max_batch: int) -> PaddedSteps | None:
    """Decode steps of that model and pool as CUDA graphs; None where there are none: they run as they are then."""
    record = recorder(model.device)
    if record is None or not isinstance(pool, PackedKvPool):
        return None
    steps = PaddedSteps(model, pool, most_tokens=max_batch)
    try:
        steps.record(record)
    except RuntimeError as error:  # some mixtures of experts ask the GPU on the way
        log.warning("decode steps run without CUDA graphs, more slowly: %s", error)
        return None
    return steps
