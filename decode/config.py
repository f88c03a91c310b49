"""Settings of a decode worker."""

from typing import Literal

from pydantic import Field

from ..worker.config import WorkerConfig


class DecodeConfig(WorkerConfig):
    """Those of every worker (`worker/config.py`) and its own. `pool_gib` is shared out in `decode/memory.py`."""

    pool: Literal["auto", "dense", "packed"] = Field(
        default="auto", description="packed: pages stay packed in the pool, in the default codec only."
    )
    prefix_cache: float = Field(
        default=0.5, ge=0, le=1, description="Share of the pool kept for prompts that start alike."
    )
    headroom_tokens: int = Field(
        default=128, ge=1, description="Tokens of output that a request has pages for when it is admitted."
    )
    preempt_gib: float = Field(
        default=2.0,
        ge=0,
        description="Host memory for pages of preempted requests, in GiB; 0: pages for all output at once.",
    )
    max_batch: int = Field(default=64, ge=1, description="Requests that hold pages at once.")
    max_waiting: int = Field(default=1024, ge=1, description="Requests that wait for pages; more are refused.")
    cuda_graphs: Literal["auto", "never"] = Field(
        default="auto", description="Decode steps recorded at the start; auto: on a GPU with a packed pool."
    )
    chunk_tokens: int = Field(
        default=128, ge=8, description="Prompt and replay tokens in a step beside running requests."
    )
    inbox_mib: int = Field(
        default=64, ge=1, description="Received frames not yet decoded, in MiB; above it transfers pause."
    )
    decode_mib_per_step: int = Field(default=16, ge=1, description="MiB of received frames decoded between two steps.")
