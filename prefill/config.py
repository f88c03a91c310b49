"""Settings of a prefill worker."""

from pydantic import Field, model_validator

from ..worker.config import WorkerConfig


class PrefillConfig(WorkerConfig):
    """Those of every worker, and its own. The pool holds the KV of prompts in work, and pages that are kept."""

    chunk_tokens: int | None = Field(None, ge=64)  # computed in one step, over all prompts; none: 512, on a CPU 256
    max_waiting_tokens: int = Field(1_000_000, ge=1)  # prompts in work; more are refused with RESOURCE_EXHAUSTED
    host_buffer_gib: float = Field(1.0, gt=0)  # encoded pages under way; prompts wait for their share
    host_cache_gib: float = Field(1.0, ge=0)  # encoded pages kept in host memory for prompts to come
    store_dir: str | None = None  # a folder that keeps pages on disk, also for other workers; none: no store
    store_gib: float = Field(10.0, gt=0)  # size of that folder, at most

    @model_validator(mode="after")
    def _chunk_is_pages(self) -> "PrefillConfig":
        if self.chunk_tokens and self.chunk_tokens % self.page_tokens:
            raise ValueError(f"chunk_tokens must be a multiple of page_tokens ({self.page_tokens})")
        return self
