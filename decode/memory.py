"""How a decode worker of a model divides its machine's memory: its budgets, what is used of them, and its pool.

All KV on the device lies in one of three parts of `pool_gib`: pages, raw pages beside packed ones, and prompts that the
worker computes itself. These need their raw KV until they are done: as many at once as fit into their part, which holds
the longest prompt that the pool can hold, so that none is ever too long.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.shapes import LayerShape
from ..kvtransfer.codecs.registry import build_codec
from ..kvtransfer.codecs.tq import TqCodec
from ..kvtransfer.pairing import CodecSet
from ..kvtransfer.pool.dense import token_bytes
from ..model.memory import GIB, PROCESS_BYTES, Budget, ModelSize
from ..model.model import Model
from ..proto.errors import InvalidRequest
from ..proto.worker_pb2 import MemoryUse
from ..worker.config import chunk_tokens_for
from .config import DecodeConfig
from .pool.base import KvPool
from .pool.dense import DenseKvPool
from .pool.forks import FORK_BYTES
from .pool.packed import PackedKvPool
from .pool.packed_pages import raw_pages

log = logging.getLogger(__name__)

PAGES, RAW, LOCAL = "KV pages", "raw pages", "local prompts"
SAVED, INBOX, FORKS = "preempted", "inbox", "forks"


@dataclass(frozen=True, kw_only=True)
class KvBudget:
    """Counts, and the bytes that they take."""

    pages: int  # of the pool, shared by all requests
    max_batch: int  # requests at once; fewer than the settings say where their raw pages would take half of the memory
    local_tokens: int  # of prompts computed here at once
    page_bytes: int
    raw_bytes: int  # of all raw pages beside packed ones
    local_token_bytes: int

    @property
    def pool_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def local_bytes(self) -> int:
        return self.local_tokens * self.local_token_bytes


@dataclass(frozen=True, kw_only=True)
class DecodeMemory:
    """The budgets of one worker."""

    kv: KvBudget
    budgets: Sequence[Budget]

    def uses(self, *, pages: tuple[int, int], local: int, inbox: int, saved: int, forks: int) -> list[MemoryUse]:
        """For reports: bytes in use of what grows with requests. `pages`: of the pool, and of its raw pages."""
        used = {PAGES: pages[0], RAW: pages[1], LOCAL: local, INBOX: inbox, SAVED: saved, FORKS: forks}
        return [
            MemoryUse(name=budget.name, used_bytes=used[budget.name], budget_bytes=budget.nbytes)
            for budget in self.budgets
            if budget.name in used
        ]


def plan_memory(config: DecodeConfig, size: ModelSize) -> DecodeMemory:
    """The budgets of a worker with these settings; raises as `kv_budget` and `keeps_packed`."""
    kv = budget_of(config, size.layers, size.dtype.itemsize, size.context_length, size.device.type)
    pool, raw = ("pool_gib", "pool_gib") if config.pool_tokens is None else ("pool_tokens", "max_batch")
    tokens = max(kv.max_batch, config.chunk_tokens, chunk_tokens_for(size.device, config.page_tokens))
    budgets = [
        Budget(name="process", nbytes=PROCESS_BYTES, on_device=False),
        Budget(name="weights", nbytes=size.weight_bytes),
        Budget(name=PAGES, nbytes=kv.pool_bytes, lower=pool),
        Budget(name=RAW, nbytes=kv.raw_bytes, lower=raw),
        Budget(name=LOCAL, nbytes=kv.local_bytes, lower=pool),
        Budget(name="activations", nbytes=size.activation_bytes(tokens, kv.max_batch), lower="max_batch"),
        Budget(name=SAVED, nbytes=int(config.preempt_gib * GIB), lower="preempt_gib", on_device=False),
        Budget(name=INBOX, nbytes=config.inbox_mib << 20, lower="inbox_mib", on_device=False),
        Budget(name=FORKS, nbytes=FORK_BYTES, on_device=False),
    ]
    return DecodeMemory(kv=kv, budgets=[budget for budget in budgets if budget.nbytes])


def keeps_packed(config: DecodeConfig, device: str) -> bool:
    """Whether pages stay packed: by default on a GPU with a codec whose pages attention can read.

    InvalidRequest where that is asked for with any other codec.
    """
    readable = config.default_codec.startswith("tq-")
    if config.pool == "packed" and not readable:
        raise InvalidRequest(f"the packed pool cannot hold codec {config.default_codec!r}; allowed: the tq- codecs")
    return config.pool == "packed" or (config.pool == "auto" and device == "cuda" and readable)


def budget_of(
    config: DecodeConfig, layers: Sequence[LayerShape], itemsize: int, context_length: int, device: str
) -> KvBudget:
    """How a worker with these settings divides its memory for KV; see `kv_budget`."""
    page_bytes = None
    if keeps_packed(config, device):
        codec = build_codec(config.default_codec, layers, config.page_tokens)
        page_bytes = sum(codec.page_bytes(layer) for layer in range(len(layers)))
    budget = kv_budget(config, layers, itemsize, context_length, packed_page_bytes=page_bytes)
    if budget.max_batch < config.max_batch:
        log.warning(
            "raw pages of max_batch %d would take more than half of pool_gib: %d requests run at once",
            *(config.max_batch, budget.max_batch),
        )
    return budget


def kv_budget(
    config: DecodeConfig,
    layers: Sequence[LayerShape],
    itemsize: int,
    context_length: int,
    *,
    packed_page_bytes: int | None,
) -> KvBudget:
    """The budget of a pool; `packed_page_bytes`: of one page of all layers where pages stay packed, None: dense.

    `itemsize` is that of the computation's dtype. InvalidRequest where `pool_gib` holds no page.
    """
    per_token = token_bytes(layers, itemsize)
    raw_page = per_token * config.page_tokens
    page_bytes, batch, raw_bytes = raw_page, config.max_batch, 0
    rest = int(config.pool_gib * GIB)
    if packed_page_bytes is not None:
        page_bytes = packed_page_bytes
        if config.pool_tokens is None:
            batch = _batch(config, raw_page, rest // 2)
        raw_bytes = raw_page * (raw_pages(batch, cached=bool(config.prefix_cache)) + 1)
        rest -= raw_bytes
    longest = -(-context_length // config.page_tokens)  # pages
    if config.pool_tokens is not None:  # the rest comes on top
        pages = max(1, config.pool_tokens // config.page_tokens)
    else:
        pages = max((rest - longest * raw_page) // page_bytes, rest // (page_bytes + raw_page))
        if pages < 1 or batch < 1:
            raise InvalidRequest(
                f"pool_gib {config.pool_gib:g} holds no request: a page of this model takes {raw_page / GIB:.2g} GiB "
                "raw, and a request some of them: raise pool_gib"
            )
    return KvBudget(
        pages=pages,
        max_batch=batch,
        local_tokens=min(context_length, pages * config.page_tokens),
        page_bytes=page_bytes,
        raw_bytes=raw_bytes,
        local_token_bytes=per_token,
    )


def _batch(config: DecodeConfig, raw_page: int, room: int) -> int:
    """How many requests have their raw pages in so many bytes, at most `max_batch`; 0 for none."""
    slots, cached = room // raw_page - 1, bool(config.prefix_cache)
    return max(0, min(config.max_batch, slots // raw_pages(1, cached=cached)))


def make_pool(config: DecodeConfig, model: Model, codecs: CodecSet, budget: KvBudget) -> KvPool:
    """An empty pool of the size that the budget says."""
    cached, codec = int(config.prefix_cache * budget.pages), codecs.get(config.default_codec)
    if not keeps_packed(config, model.device.type):
        return DenseKvPool(model, codecs.get, budget.pages, config.page_tokens, cached_pages=cached)
    assert isinstance(codec, TqCodec)
    return PackedKvPool(model, codec, budget.pages, config.page_tokens, budget.max_batch, cached_pages=cached)
