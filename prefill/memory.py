"""What a prefill worker of a model takes of its machine's memory: its budgets, and what is used of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..kvtransfer.pool.dense import pages_in, token_bytes
from ..kvtransfer.storage.store import QUEUE_BYTES
from ..model.memory import GIB, PROCESS_BYTES, Budget, ModelSize
from ..proto.worker_pb2 import MemoryUse
from ..worker.config import chunk_tokens_for
from .config import PrefillConfig

PAGES, BUFFER, CACHE, QUEUE = "KV pages", "send buffer", "page cache", "store queue"


@dataclass(frozen=True, kw_only=True)
class PrefillMemory:
    """The budgets of one worker."""

    pages: int  # of the pool
    page_bytes: int  # of each
    budgets: Sequence[Budget]

    def uses(self, *, pages: int, buffered: int, cached: int, queued: int) -> list[MemoryUse]:
        """For reports: bytes in use of what grows with requests."""
        used = {PAGES: pages, BUFFER: buffered, CACHE: cached, QUEUE: queued}
        return [
            MemoryUse(name=budget.name, used_bytes=used[budget.name], budget_bytes=budget.nbytes)
            for budget in self.budgets
            if budget.name in used
        ]


def plan_memory(config: PrefillConfig, size: ModelSize) -> PrefillMemory:
    """The budgets of a worker with these settings."""
    page_bytes = token_bytes(size.layers, size.dtype.itemsize) * config.page_tokens
    pages = pages_in(size.layers, config.page_tokens, size.dtype, gib=config.pool_gib, tokens=config.pool_tokens)
    pool = "pool_tokens" if config.pool_tokens is not None else "pool_gib"
    chunk = config.chunk_tokens or chunk_tokens_for(size.device, config.page_tokens)
    rows = max(1, chunk // config.page_tokens)
    budgets = [
        Budget(name="process", nbytes=PROCESS_BYTES, on_device=False),
        Budget(name="weights", nbytes=size.weight_bytes),
        Budget(name=PAGES, nbytes=pages * page_bytes, lower=pool),
        Budget(name="activations", nbytes=size.activation_bytes(chunk, rows), lower="chunk_tokens"),
        Budget(name=BUFFER, nbytes=int(config.host_buffer_gib * GIB), lower="host_buffer_gib", on_device=False),
        Budget(name=CACHE, nbytes=int(config.host_cache_gib * GIB), lower="host_cache_gib", on_device=False),
        Budget(name=QUEUE, nbytes=QUEUE_BYTES if config.store_dir else 0, on_device=False),
    ]
    return PrefillMemory(pages=pages, page_bytes=page_bytes, budgets=[budget for budget in budgets if budget.nbytes])
