"""Settings of a decode worker."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..kvtransfer.codecs.registry import DEFAULT_CODEC
from ..model.dtypes import Dtype
from ..proto.rpc.addresses import checked_address


class DecodeConfig(BaseModel):
    """Unknown keys are errors. Sizes in tokens are of KV, over all layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # a local folder, a GGUF file, a hub id, or a name that `isthmus models` lists
    listen: str = "127.0.0.1:0"  # host:port; port 0 picks a free one
    advertise: str | None = None  # host:port told to others; default: as bound, for all interfaces the one outward
    name: str | None = None  # of this worker in reports; default: role, host and port
    dtype: Dtype = "auto"  # of weights, and of KV where the device computes in it (model/dtypes.py)
    device: str = "auto"  # cpu, cuda, cuda:1, or a GPU where there is one
    threads: int = Field(1, ge=1)  # of torch; set before it is imported
    codecs: tuple[str, ...] = ()  # that requests may ask for; empty: all
    default_codec: str = DEFAULT_CODEC
    balance: str | None = None  # a file of `isthmus calibrate --out`; none: made at first load and kept (docs/codec.md)
    page_tokens: int = Field(64, ge=8, le=1024, multiple_of=8)
    pool: Literal["auto", "dense", "packed"] = "auto"  # packed: pages stay packed, in the default codec only
    pool_gib: float = Field(2.0, gt=0)  # memory for all KV on the device (decode/budget.py)
    pool_tokens: int | None = Field(None, ge=1)  # tokens of the pool alone; wins over pool_gib
    prefix_cache: float = Field(0.5, ge=0, le=1)  # share of the pool kept for prompts that start alike; 0: no reuse
    headroom_tokens: int = Field(128, ge=1)  # of output that a request has pages for when it is admitted; then it grows
    preempt_gib: float = Field(
        2.0, ge=0
    )  # host memory for pages of preempted requests; 0: pages for all output at once
    max_batch: int = Field(64, ge=1)  # requests that hold pages at once
    max_waiting: int = Field(1024, ge=1)  # requests that wait for pages; more are refused
    cuda_graphs: Literal["auto", "never"] = (
        "auto"  # of decode steps, recorded at the start; auto: on a GPU, packed pool
    )
    chunk_tokens: int = Field(128, ge=8)  # of prompts and replays in a step beside running requests; a page at least
    inbox_mib: int = Field(64, ge=1)  # received frames not yet decoded; above it the transfer pauses
    decode_mib_per_step: int = Field(16, ge=1)  # of received frames decoded between two steps of a running batch

    @field_validator("listen")
    @classmethod
    def _can_be_bound(cls, value: str) -> str:
        return checked_address(value)

    @field_validator("advertise")
    @classmethod
    def _can_be_dialled(cls, value: str | None) -> str | None:
        return value if value is None else checked_address(value, to_dial=True)
