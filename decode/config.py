"""Settings of a decode worker."""

from typing import Literal

from pydantic import Field

from ..worker.config import WorkerConfig


class DecodeConfig(WorkerConfig):
    """Those of every worker, and its own. `pool_gib` is divided in `decode/memory.py`."""

    pool: Literal["auto", "dense", "packed"] = "auto"  # packed: pages stay packed, in the default codec only
    prefix_cache: float = Field(0.5, ge=0, le=1)  # share of the pool kept for prompts that start alike; 0: no reuse
    headroom_tokens: int = Field(128, ge=1)  # of output that a request has pages for at first; then it grows
    preempt_gib: float = Field(2.0, ge=0)  # host memory for preempted requests; 0: pages for all output at once
    max_batch: int = Field(64, ge=1)  # requests that hold pages at once
    max_waiting: int = Field(1024, ge=1)  # requests that wait for pages; more are refused
    cuda_graphs: Literal["auto", "never"] = "auto"  # of decode steps; auto: on a GPU with the packed pool
    chunk_tokens: int = Field(128, ge=8)  # of prompts and replays in a step beside running requests; a page at least
    inbox_mib: int = Field(64, ge=1)  # received frames not yet decoded; above it the transfer pauses
    decode_mib_per_step: int = Field(16, ge=1)  # of received frames decoded between two steps of a running batch
