"""Settings of a prefill worker."""

from pydantic import Field, model_validator

from ..worker.config import WorkerConfig


class PrefillConfig(WorkerConfig):
    """Those of every worker (`worker/config.py`) and its own."""

    chunk_tokens: int | None = Field(
        default=None, ge=64, description="Prompt tokens of a step, over all prompts; default: 512, on a CPU 256."
    )
    max_waiting_tokens: int = Field(default=1_000_000, ge=1, description="Tokens of prompts in work; more are refused.")
    host_buffer_gib: float = Field(
        default=1.0, gt=0, description="Encoded pages being sent, in GiB; prompts wait for a share."
    )
    host_cache_gib: float = Field(
        default=1.0, ge=0, description="Encoded pages kept in host memory for prompts to come, in GiB."
    )
    store_dir: str | None = Field(
        default=None, description="Folder where prefill workers keep KV pages on disk; default: no store."
    )
    store_gib: float = Field(default=10.0, gt=0, description="Largest size of that folder, in GiB.")
    store_key_file: str | None = Field(
        default=None, description="File of 32 random bytes or more, mode 0600: pages in the store are encrypted."
    )

    @model_validator(mode="after")
    def _key_has_a_store(self) -> "PrefillConfig":
        if self.store_key_file and not self.store_dir:
            raise ValueError("store_key_file encrypts the pages of a store; allowed: with store_dir only")
        return self

    @model_validator(mode="after")
    def _chunk_is_pages(self) -> "PrefillConfig":
        if self.chunk_tokens and self.chunk_tokens % self.page_tokens:
            raise ValueError(f"chunk_tokens must be a multiple of page_tokens ({self.page_tokens})")
        return self
