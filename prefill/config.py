"""Settings of a prefill worker."""

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..kvtransfer.codecs.registry import DEFAULT_CODEC
from ..model.dtypes import Dtype
from ..proto.rpc.addresses import checked_address


class PrefillConfig(BaseModel):
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
    pool_gib: float = Field(2.0, gt=0)  # memory for the KV of prompts in work
    pool_tokens: int | None = Field(None, ge=1)  # the same as a number of tokens; wins over pool_gib
    chunk_tokens: int | None = Field(None, ge=64)  # computed in one step, over all prompts; none: 512, on a CPU 256
    max_waiting_tokens: int = Field(1_000_000, ge=1)  # prompts in work; more are refused with RESOURCE_EXHAUSTED
    host_buffer_gib: float = Field(1.0, gt=0)  # encoded pages under way; prompts wait for their share
    host_cache_gib: float = Field(1.0, ge=0)  # encoded pages kept in host memory for prompts to come
    store_dir: str | None = None  # a folder that keeps pages on disk, also for other workers; none: no store
    store_gib: float = Field(10.0, gt=0)  # size of that folder, at most

    @field_validator("listen")
    @classmethod
    def _can_be_bound(cls, value: str) -> str:
        return checked_address(value)

    @field_validator("advertise")
    @classmethod
    def _can_be_dialled(cls, value: str | None) -> str | None:
        return value if value is None else checked_address(value, to_dial=True)

    @model_validator(mode="after")
    def _chunk_is_pages(self) -> "PrefillConfig":
        if self.chunk_tokens and self.chunk_tokens % self.page_tokens:
            raise ValueError(f"chunk_tokens must be a multiple of page_tokens ({self.page_tokens})")
        return self
