"""What a decode worker of a model takes of its machine's memory: its budgets, and what is used of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..model.memory import GIB, PROCESS_BYTES, Budget, ModelSize
from ..proto.worker_pb2 import MemoryUse
from ..worker.chunks import chunk_tokens_for
from .budget import KvBudget
from .config import DecodeConfig
from .pool_choice import budget_of

PAGES, RAW, LOCAL, SAVED, INBOX = "KV pages", "raw pages", "local prompts", "preempted", "inbox"


@dataclass(frozen=True, kw_only=True)
class DecodeMemory:
    """The budgets of one worker."""

    kv: KvBudget
    budgets: Sequence[Budget]

    def uses(self, *, pages: tuple[int, int], local: int, inbox: int, saved: int) -> list[MemoryUse]:
        """For reports: bytes in use of what grows with requests. `pages`: of the pool, and of its raw pages."""
        used = {PAGES: pages[0], RAW: pages[1], LOCAL: local, INBOX: inbox, SAVED: saved}
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
    ]
    return DecodeMemory(kv=kv, budgets=[budget for budget in budgets if budget.nbytes])
