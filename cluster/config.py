"""Settings of a whole cluster, from a YAML file and flags; the workers' own settings are checked by their
folders."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..decode.config import DecodeConfig
from ..kvtransfer.codecs.registry import DEFAULT_CODEC, codec_names
from ..model.dtypes import Dtype
from ..prefill.config import PrefillConfig
from ..proto.errors import InvalidRequest
from ..proto.rpc.addresses import HostPort, checked_address
from .gateway_config import GatewayConfig
from .jobs.settings import chosen_url

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PORT = 50051
DEFAULT_LISTEN = "127.0.0.1:0"  # of a worker

Role = Literal["prefill", "decode"]
CONFIG_OF: dict[Role, type[PrefillConfig] | type[DecodeConfig]] = {
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
}
# Settings that mean the same in both roles: what a user set of these goes along where a worker changes its role.
# Both have `chunk_tokens` too, which is another thing in each.
SHARED = frozenset(
    (
        *("model", "listen", "advertise", "name", "dtype", "device", "threads"),
        *("codecs", "default_codec", "balance", "page_tokens", "pool_gib", "pool_tokens"),
    )
)


class ClusterConfig(BaseModel):
    """What `isthmus up` starts. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: int = Field(1, ge=1, le=1024)  # number of prefill workers
    decode: int = Field(1, ge=1, le=1024)  # number of decode workers
    model: str = DEFAULT_MODEL  # a local folder, a GGUF file, a hub id, or a name that `isthmus models` lists
    codec: str = DEFAULT_CODEC  # of the KV transfer where a request names none
    codecs: tuple[str, ...] = ()  # that requests may ask for; empty: all
    balance: str | None = None  # a file of `isthmus calibrate --out` on every host; default: each host makes its own
    host: str = "127.0.0.1"  # that the gateway listens on
    port: int = Field(DEFAULT_PORT, ge=0, le=65535)  # 0 picks a free one
    dtype: Dtype = "auto"  # of weights, and of KV where the device computes in it (model/dtypes.py)
    device: str = "auto"  # cpu, cuda, or a GPU where there is one
    threads: int | None = Field(None, ge=1)  # of torch in each worker; default: cores / workers
    # In the names of Ray actors, which several clusters may share one Ray for; default: drawn at each start.
    cluster_id: str = Field(default_factory=lambda: secrets.token_hex(4), pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    address: str | None = None  # of a Ray cluster to join ("auto" finds one here); default: start a local one
    drain_s: float = Field(30.0, ge=0)  # how long running requests may take when the cluster stops
    store_dir: str | None = None  # a folder where prefill workers keep KV pages on disk; default: none
    store_gib: float = Field(10.0, gt=0)  # size of that folder, at most
    gateway: GatewayConfig = GatewayConfig()  # where requests run (cluster/gateway_config.py)
    prefill_worker: dict[str, Any] = {}  # further settings of prefill workers (prefill/config.py)
    decode_worker: dict[str, Any] = {}  # further settings of decode workers (decode/config.py)

    @field_validator("codec", "codecs")
    @classmethod
    def _known(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if name not in codec_names():
                raise ValueError(f"no codec {name!r}; allowed: {', '.join(codec_names())}")
        return value

    @field_validator("host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        checked_address(str(HostPort(host, 0)))
        return host

    @property
    def listen(self) -> str:
        """host:port of the gateway."""
        return str(HostPort(self.host, self.port))

    @property
    def workers(self) -> int:
        """Number of workers of both roles."""
        return self.prefill + self.decode

    def with_jobs(self, named: str | None) -> Self:
        """With a database of jobs: the one named here, that of the settings, or the default one (`chosen_url`)."""
        gateway = self.gateway.model_copy(update={"jobs_db": chosen_url(named, self.gateway.jobs_db)})
        return self.model_copy(update={"gateway": gateway})

    def worker_settings(self, role: Role, name: str, listen: str, threads: int) -> dict[str, Any]:
        """The settings of one worker as plain data, checked. InvalidRequest where a key or value is wrong."""
        own = self.prefill_worker if role == "prefill" else self.decode_worker
        shared = {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "default_codec": self.codec,
            "codecs": self.codecs,
            "balance": self.balance,
            "name": name,
            "listen": listen,
            "threads": threads,
        }
        if role == "prefill":
            shared |= {"store_dir": self.store_dir, "store_gib": self.store_gib}
        try:
            return CONFIG_OF[role](**{**shared, **own}).model_dump()
        except ValidationError as error:
            raise InvalidRequest(f"{role}_worker: {explain(error, CONFIG_OF[role])}") from None


def load_config(
    path: Path | None, flags: Mapping[str, Any], gateway_flags: Mapping[str, Any] | None = None
) -> ClusterConfig:
    """The settings of a file, if any, with the flags that are not None on top, and those of the gateway on those that
    the file has for it. InvalidRequest for bad ones."""
    from_file = _read(path) if path is not None else {}
    where = f"{path}: " if path is not None else ""
    chosen = {key: value for key, value in flags.items() if value is not None}
    known = from_file.get("gateway", {})
    if gateway_flags and isinstance(known, dict):  # else its own mistake is told
        chosen["gateway"] = {**known, **gateway_flags}
    try:
        config = ClusterConfig(**{**from_file, **chosen})
    except ValidationError as error:
        raise InvalidRequest(where + explain(error, ClusterConfig)) from None
    for role in CONFIG_OF:
        config.worker_settings(role, "check", "127.0.0.1:0", config.threads or 1)
    return config


def gateway_config(settings: Mapping[str, Any]) -> GatewayConfig:
    """The settings of a gateway; InvalidRequest for bad ones."""
    try:
        return GatewayConfig(**settings)
    except ValidationError as error:
        raise InvalidRequest(explain(error, GatewayConfig)) from None


def load_worker_settings(
    role: Role, path: Path | None, flags: Mapping[str, Any], *, default_threads: int
) -> dict[str, Any]:
    """The settings of one worker from a file, if any, with flags on top; InvalidRequest for bad ones.

    Nothing that is left to its default but model, threads and address.
    """
    from_file = _read(path) if path is not None else {}
    where = f"{path}: " if path is not None else ""
    given = {"model": DEFAULT_MODEL, "threads": default_threads, "listen": DEFAULT_LISTEN, **from_file, **flags}
    try:
        return CONFIG_OF[role](**given).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise InvalidRequest(where + explain(error, CONFIG_OF[role])) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All that is wrong with settings, in one line."""
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}; allowed: {', '.join(model.model_fields)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = item["input"]
            given = f" is {value!r}" if isinstance(value, str | int | float) else ""
            problems.append(f"{key}{given}: {message}" if key else message)
    return "; ".join(problems)


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InvalidRequest(f"{path} is not YAML: {problem}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise InvalidRequest(f"{path} is not a mapping of settings")
    return loaded
