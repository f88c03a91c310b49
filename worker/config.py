"""Settings that workers of both roles have."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ..kvtransfer.codecs.registry import DEFAULT_CODEC
from ..model.dtypes import Dtype
from ..proto.rpc.addresses import checked_address
from ..proto.security.identity import CLUSTER_PATTERN
from ..proto.security.settings import WorkerTls

if TYPE_CHECKING:
    import torch

GPU_CHUNK_TOKENS, CPU_CHUNK_TOKENS = 512, 256


def _split(value: Any) -> Any:
    """A text with commas as a list, for environment variables and flags."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


class WorkerConfig(BaseModel):
    """Each setting here means the same in both roles. Unknown keys are errors. Sizes in tokens are of KV, over all
    layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default="smollm2-135m", description="Model: a name of `isthmus models`, a folder, .gguf file or hub id."
    )
    model_manifest: str | None = Field(
        default=None, description="File of `isthmus models verify --write`; a start fails where the model differs."
    )
    listen: str = Field(
        default="127.0.0.1:0", description="host:port to listen on; port 0 picks a free one; [::]:7001 is IPv6."
    )
    advertise: str | None = Field(
        default=None, description="host:port for others; default: as bound, or of the interface that routes outward."
    )
    health_listen: str | None = Field(
        default=None, description="host:port for health probes in plain text; default: with certificates only."
    )
    tls: WorkerTls = Field(
        default="auto",
        description="auto: certificates of this user on this machine; {ca, cert, key}: files; off: plain text.",
    )
    cluster_id: str | None = Field(
        default=None, pattern=CLUSTER_PATTERN, description="Cluster that its certificate names; default: any."
    )
    name: str | None = Field(default=None, description="Name of this worker in status; default: role, host and port.")
    dtype: Dtype = Field(
        default="auto", description="Of weights and KV; auto: what the device is fast at; float16: GPUs only."
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:1, or auto: a GPU where there is one.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="PyTorch threads of a worker; default: half of the cores, in `isthmus up` cores / workers.",
    )
    codecs: Names = Field(default=(), description="Codecs that requests may ask for; all where empty.")
    default_codec: str = Field(
        default=DEFAULT_CODEC, description="Codec of the KV transfer where a request names none."
    )
    balance: str | None = Field(
        default=None, description="File of `isthmus calibrate --out`; default: made at first load and kept."
    )
    page_tokens: int = Field(default=64, ge=8, le=1024, multiple_of=8, description="Tokens of a KV page.")
    pool_gib: float = Field(default=2.0, gt=0, description="Memory for KV on the device, in GiB.")
    pool_tokens: int | None = Field(
        default=None, ge=1, description="Size of the KV pool in tokens; wins over pool_gib."
    )

    @field_validator("listen")
    @classmethod
    def _can_be_bound(cls, value: str) -> str:
        return checked_address(value)

    @field_validator("health_listen")
    @classmethod
    def _can_be_probed(cls, value: str | None) -> str | None:
        return value if value is None else checked_address(value)

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
