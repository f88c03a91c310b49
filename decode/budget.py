"""How a decode worker divides `pool_gib`: pages, raw pages beside packed ones, prompts that it computes itself. Pure.

All KV on the device lies in one of the three. Prompts computed here need their raw KV until they are done: as many at
once as fit into their part, which holds the longest prompt that the pool can hold, so that none is ever too long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.shapes import LayerShape
from ..kvtransfer.pool.dense import token_bytes
from ..proto.errors import InvalidRequest
from .config import DecodeConfig
from .pool.raw_slots import raw_slots

GIB = 1 << 30


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
        raw_bytes = raw_page * (raw_slots(batch, cached=bool(config.prefix_cache)) + 1)
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
    return max(0, min(config.max_batch, slots // raw_slots(1, cached=cached)))
