"""Settings of a whole cluster: one file for `isthmus up`, `gateway` and `worker`. What a role alone needs, its folder
defines; this composes it. `sources.py` reads file, environment and flags."""

import secrets
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, field_validator

from ..decode.config import DecodeConfig
from ..kvtransfer.codecs.registry import codec_names
from ..model.dtypes import Dtype
from ..prefill.config import PrefillConfig
from ..proto.errors import InvalidRequest
from ..proto.rpc.addresses import HostPort, checked_address, parse_address
from ..proto.security.credentials import Security
from ..proto.security.identity import CLUSTER_PATTERN
from ..proto.security.identity import Role as HolderRole
from ..proto.security.settings import Tls, security_of
from ..worker.config import Names, Settings, WorkerConfig
from . import defaults
from .fleet.report import Role
from .gateway_config import GatewayConfig
from .jobs.settings import database_url
from .logs.configure import LogFormat
from .sources import Origin, Setting, explain, read_sources, warn_of_unknown_variables
from .supervisor_config import SupervisorConfig

CONFIG_OF: dict[Role, type[PrefillConfig] | type[DecodeConfig]] = {
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
}
# Settings that mean the same in both roles: what a user set of these goes along where a worker changes its role.
# Both have `chunk_tokens` too, which is another thing in each.
SHARED = frozenset(WorkerConfig.model_fields)
# Settings of all workers, by their names in a worker's own settings.
OF_WORKERS = {
    **{name: name for name in ("model", "model_manifest", "dtype", "device", "threads", "codecs", "balance")},
    **{name: name for name in ("store_dir", "store_gib", "store_key_file", "tls", "cluster_id")},
    "codec": "default_codec",
}
OF_ONE_PROCESS = ("name", "listen", "advertise")  # settings of a worker that is started by hand
OPTION_NAMES = {"default_codec": "codec"}  # of options that are not named like their setting


def _same(model: type[BaseModel], name: str) -> Any:
    """The field as another model has it: default, limits and description."""
    return copy(model.model_fields[name])


class ClusterConfig(Settings):
    """The settings file."""

    prefill: int = Field(default=1, ge=0, le=1024, description="Number of prefill workers.")
    decode: int = Field(default=1, ge=0, le=1024, description="Number of decode workers.")
    model: str = _same(WorkerConfig, "model")
    model_manifest: str | None = _same(WorkerConfig, "model_manifest")
    codec: str = _same(WorkerConfig, "default_codec")
    codecs: Names = _same(WorkerConfig, "codecs")
    balance: str | None = _same(WorkerConfig, "balance")
    host: str = Field(defaults.HOST, description="Host that the gateway listens on.")
    port: int = Field(defaults.PORT, ge=0, le=65535, description="Port of the gateway; 0 picks a free one.")
    dtype: Dtype = _same(WorkerConfig, "dtype")
    device: str = _same(WorkerConfig, "device")
    threads: int | None = _same(WorkerConfig, "threads")
    cluster_id: str = Field(
        default_factory=lambda: secrets.token_hex(4),
        pattern=CLUSTER_PATTERN,
        description="In certificates and names of Ray actors, for clusters on one Ray; default: drawn at each start.",
    )
    tls: Tls = Field(
        default="auto",
        description="auto: certificates of this user on this machine; {ca, cert, key}: files; off: plain text.",
    )
    address: str | None = Field(
        default=None, description="Ray cluster to join, auto: the one here; default: start a local Ray."
    )
    worker_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port of each worker of `isthmus supervise`, which Ray places one a host; default: a free one.",
    )
    prefill_gpus: int | None = Field(
        default=None, ge=0, description="GPUs that Ray gives a prefill worker; default: 1 where it knows of any."
    )
    decode_gpus: int | None = Field(
        default=None, ge=0, description="GPUs that Ray gives a decode worker; default: 1 where it knows of any."
    )
    drain_s: float = Field(
        defaults.DRAIN_S, ge=0, description="Time for running requests when it stops; others take those left."
    )
    log_format: LogFormat = Field("json", description="Lines of the log: json or text.")
    log_content: bool = Field(False, description="Whether the gateway logs prompts and outputs too.")
    audit_file: str | None = Field(
        None, min_length=1, description="File that the audit log is appended to (0600), beside stderr."
    )
    store_dir: str | None = _same(PrefillConfig, "store_dir")
    store_gib: float = _same(PrefillConfig, "store_gib")
    store_key_file: str | None = _same(PrefillConfig, "store_key_file")
    gateway: GatewayConfig = Field(default=GatewayConfig(), description="The gateway: where requests run.")
    supervisor: SupervisorConfig = Field(
        default=SupervisorConfig(), description="The supervisor, where it is a process apart from the gateways."
    )
    prefill_worker: PrefillConfig = Field(
        default=PrefillConfig(), description="Prefill workers; wins over the settings above."
    )
    decode_worker: DecodeConfig = Field(
        default=DecodeConfig(), description="Decode workers; wins over the settings above."
    )

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

    @property
    def named_cluster(self) -> str | None:
        """The `cluster_id` that was set; None where it was drawn, which no certificate names."""
        return self.cluster_id if "cluster_id" in self.model_fields_set else None

    def security(self, *roles: HolderRole) -> Security | None:
        """The certificates of a process of these roles; None: plain text. InvalidRequest where there are none."""
        listening = (self.listen, self.gateway.admin_listen, self.supervisor.listen)
        hosts = tuple(parse_address(address).host for address in listening if address)
        return security_of(self.tls, self.named_cluster, *roles, listening=hosts)

    def with_http(self, port: int | None, *, none: bool = False, by_default: bool = False) -> Self:
        """With HTTP on a port of the gateway's host, or on none. Where neither is said, as the settings have it; where
        they have nothing and it is answered `by_default`, on the usual port, or a free one beside a free one."""
        listen = self.gateway.http_listen
        if port is None and by_default and "http_listen" not in self.gateway.model_fields_set:
            port = defaults.HTTP_PORT if self.port else 0
        if port is not None:
            listen = str(parse_address(self.listen)._replace(port=port))
        gateway = self.gateway.model_copy(update={"http_listen": None if none else listen})
        return self.model_copy(update={"gateway": gateway})

    def with_jobs(self) -> Self:
        """With the URL of the database of jobs in place of its name (`database_url`)."""
        gateway = self.gateway.model_copy(update={"jobs_db": database_url(self.gateway.jobs_db)})
        return self.model_copy(update={"gateway": gateway})

    def worker_settings(self, role: Role, name: str, listen: str, threads: int | None) -> dict[str, Any]:
        """The settings of one of the cluster's workers as plain data, checked. InvalidRequest where one is wrong.

        Name and addresses in the file are those of a process that is started by hand: no two of these may share them.
        """
        own = {"name": name, "listen": listen, "threads": threads}
        return self._checked(role, own, without=OF_ONE_PROCESS).model_dump()

    def process_settings(self, role: Role, *, default_threads: int | None) -> dict[str, Any]:
        """The settings of a worker that is a process of its own, checked. InvalidRequest where one is wrong.

        Nothing that is left to its default but model, threads and address: what was set goes along when it flips.
        """
        base = {name: WorkerConfig.model_fields[name].default for name in ("model", "listen")}
        return self._checked(role, {**base, "threads": default_threads}).model_dump(exclude_unset=True)

    def set_for_workers(self, role: Role) -> dict[str, Setting]:
        """What was set of the settings of a role's workers, and where in this file: for all workers or for the role."""
        section = f"{role}_worker"
        of_all = {
            OF_WORKERS[name]: (name,)
            for name in self.model_fields_set & set(OF_WORKERS)
            if OF_WORKERS[name] in CONFIG_OF[role].model_fields and getattr(self, name) is not None
        }
        return of_all | {name: (section, name) for name in getattr(self, section).model_fields_set}

    def value(self, setting: Setting) -> Any:
        """Of a setting, which may be in a section."""
        return reduce(getattr, setting, self)

    def _checked(
        self, role: Role, base: Mapping[str, Any], without: Collection[str] = ()
    ) -> PrefillConfig | DecodeConfig:
        found = self.set_for_workers(role)
        settings = {name: self.value(setting) for name, setting in found.items() if name not in without}
        try:
            return CONFIG_OF[role](**{**base, **settings})
        except ValidationError as error:
            raise InvalidRequest(f"{role}_worker: {explain(error, CONFIG_OF[role])}") from None


@dataclass(frozen=True)
class Loaded:
    """Settings, and where those come from that are not at their default."""

    config: ClusterConfig
    origins: Mapping[Setting, Origin]


def load_config(path: Path | None, flags: Mapping[str, Any]) -> ClusterConfig:
    """The settings of a file, if any, with environment variables and then flags on top, nested as in the file; a flag
    that is None sets nothing. InvalidRequest for bad ones, and for roles whose settings do not go together."""
    return load(path, flags).config


def load(path: Path | None, flags: Mapping[str, Any]) -> Loaded:
    """The same as `load_config`, with the sources."""
    given = read_sources(ClusterConfig, path, flags, OPTION_NAMES)
    warn_of_unknown_variables(ClusterConfig)
    try:
        config = ClusterConfig(**given.values)
    except ValidationError as error:
        raise InvalidRequest(explain(error, ClusterConfig, given.origins, OPTION_NAMES)) from None
    for role in CONFIG_OF:
        config.process_settings(role, default_threads=1)
    return Loaded(config, given.origins)
