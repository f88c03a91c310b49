"""Decode steps of fixed shapes, which can be recorded and replayed (`graphs.py`).

A step of one new token for each request is filled up to one of a few shapes (tokens, pages of the longest request):

1. the host writes token ids and places into the tensors of that shape; those of no request write to a scratch page;
2. the recorded forward reads them, stores KV, attends, and leaves logits in a tensor that is always the same;
3. the first rows of that are the requests'.

Steps with chunks of prompts or of replayed output run as they are, unpadded. The engine thread alone uses this.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ...model.model import Model
from ..pool.packed import PackedStore
from ..pool.page_places import PagePlaces, TokenPlace
from ..sequences.sequence import Advance
from .graphs import Call, Record

log = logging.getLogger(__name__)

_LEAST_PAGES = 32
Shape = tuple[int, int]  # tokens, pages


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

    def __init__(self, model: Model, store: PackedStore, *, most_tokens: int) -> None:
        self._model, self._store, device = model, store, model.device
        most_pages = min(store.pages_for(model.context_length), store.total_pages + 1)  # its first page is raw
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

    def shape_of(self, work: Sequence[Advance]) -> Shape | None:
        """The least shape that a step fits into; None where it has to run as it is."""
        if any(a.end - a.start != 1 or (a.in_prompt and a.sequence.local is not None) for a in work):
            return None
        tokens, pages = len(work), self._store.pages_for(max(advance.end for advance in work))
        if tokens > self._tokens[-1] or pages > self._pages[-1]:
            return None
        return self._tokens[bisect_left(self._tokens, tokens)], self._pages[bisect_left(self._pages, pages)]

    def run(self, work: Sequence[Advance], shape: Shape) -> Tensor:
        """Stores the KV of the tokens; the logits of those that sample, in order, which the next step overwrites."""
        ids = [advance.sequence.tokens(advance.start, advance.end)[0] for advance in work]
        self._fill(shape, ids, self._store.place(work))
        self._replays[shape]()
        sampled = [row for row, advance in enumerate(work) if advance.samples]
        return self._logits[: len(work)] if len(sampled) == len(work) else self._logits[sampled]

    def _fill(self, shape: Shape, ids: Sequence[int], places: Sequence[TokenPlace]) -> None:
        """Writes what a step of that shape reads."""
        size = PagePlaces.size(*shape)
        PagePlaces.over(self._host_places, *shape).fill(places, self._store.scratch)
        self._places[:size].copy_(self._host_places[:size])
        self._host_ids[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        self._ids[: len(ids)].copy_(self._host_ids[: len(ids)])

    def _forward(self, tokens: int, pages: int) -> None:
        """What is recorded: from the tensors that `_fill` wrote to the logits, with nothing of the host between."""
        places = PagePlaces.over(self._places, tokens, pages)
        attend = self._store.attend(places)
        positions = places.lengths_B.long() - 1
        self._logits[:tokens].copy_(self._model.forward(self._ids[:tokens], positions, self._rows[:tokens], attend))
