"""Settings that workers of both roles share."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..kvtransfer.codecs.names import DEFAULT_CODEC
from ..model.dtypes import Dtype
from ..proto.rpc.addresses import checked_address

if TYPE_CHECKING:
    import torch

GPU_CHUNK_TOKENS, CPU_CHUNK_TOKENS = 512, 256


class WorkerConfig(BaseModel):
    """Unknown keys are errors. Sizes in tokens are of KV, over all layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # a local folder, a GGUF file, a hub id, or a name that `isthmus models` lists
    listen: str = "127.0.0.1:0"  # host:port; port 0 picks a free one
    advertise: str | None = None  # host:port that others dial; default: as bound, for all interfaces the one outward
    name: str | None = None  # of this worker in reports; default: role, host and port
    dtype: Dtype = "auto"  # of weights, and of KV where the device computes in it (model/dtypes.py)
    device: str = "auto"  # cpu, cuda, cuda:1, or a GPU where there is one
    threads: int = Field(1, ge=1)  # of torch; set before it is imported
    codecs: tuple[str, ...] = ()  # that requests may ask for; empty: all
    default_codec: str = DEFAULT_CODEC
    balance: str | None = None  # a file of `isthmus calibrate --out`; none: made at first load and kept (docs/codec.md)
    page_tokens: int = Field(64, ge=8, le=1024, multiple_of=8)
    pool_gib: float = Field(2.0, gt=0)  # memory for all KV on the device
    pool_tokens: int | None = Field(None, ge=1)  # the same as a number of tokens of the pool; wins over pool_gib

    @field_validator("listen")
    @classmethod
    def _can_be_bound(cls, value: str) -> str:
        return checked_address(value)

    @field_validator("advertise")
    @classmethod
    def _can_be_dialled(cls, value: str | None) -> str | None:
        return value if value is None else checked_address(value, to_dial=True)


def chunk_tokens_for(device: "torch.device", page_tokens: int) -> int:
    """How many tokens of prompts a step computes at most where the settings leave that open: whole pages, at least one.

    Nobody enters a step that runs: larger ones waste less, and whoever comes next waits for longer. On a CPU, where a
    step of 512 tokens takes a small model more than a second, steps of 256 were measured to take 3 to 9 % more time a
    token (docs/reuse.md).
    """
    tokens = CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS
    return max(page_tokens, tokens - tokens % page_tokens)
