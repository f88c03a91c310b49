"""Settings of the gateway: where requests may run and what becomes of those that lose their worker."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator

from ..proto.rpc.addresses import checked_address
from ..worker.config import Names, Settings
from . import defaults
from .access.settings import AccessSettings
from .http_config import HttpConfig
from .jobs.settings import JobsSettings
from .router.policies import LocalPrefill, Policy
from .text.served import InputLimits


def parse_weights(text: str) -> dict[str, float]:
    """Weights of tenants from NAME=WEIGHT, with commas between them. ValueError where it is not that."""
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        tenant, equals, weight = part.rpartition("=")
        try:
            weights[tenant] = float(weight)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"{part!r} is not NAME=WEIGHT")
    return weights


def _weights(value: Any) -> Any:
    return parse_weights(value) if isinstance(value, str) else value


class GatewayConfig(Settings):
    """The section `gateway`."""

    workers: Names = Field(
        default=(), description="host:port of the workers of `isthmus gateway`; `isthmus up` starts its own."
    )
    supervisor: str | None = Field(
        default=None,
        description="host:port of the supervisor that tells `isthmus gateway` its workers, instead of them.",
    )
    admin_listen: str | None = Field(
        default=None,
        description=f"host:port for status and orders; default: {defaults.ADMIN}, or a free port beside a free one.",
    )
    health_listen: str | None = Field(
        default=None, description="host:port for health probes in plain text; default: on its port only."
    )
    http_listen: str | None = Field(
        default=None,
        description=f"host:port of the HTTP API; none: no HTTP; default of `isthmus up`: {defaults.HTTP_PORT} on its "
        "host, or a free port beside a free one.",
    )
    http: HttpConfig = Field(default=HttpConfig(), description="The HTTP API.")
    policy: Policy = Field(
        default="cost", description=f"How workers are chosen: cost; for comparison {', '.join(get_args(Policy)[1:])}."
    )
    local_prefill: LocalPrefill = Field(
        default="when_cheaper", description="Whether decode workers compute prompts: never, when_cheaper or always."
    )
    replays: int = Field(
        default=16, ge=0, description="Times that one request may be placed again after it lost a worker."
    )
    restart_wait_s: float = Field(
        default=30.0, ge=0, description="Time that a request waits for lost workers to be back."
    )
    wait_for_scale: bool = Field(
        default=True,
        description="Whether requests wait, for restart_wait_s, where a pool has no worker; else they are refused.",
    )
    propagation_s: float = Field(
        default=0.0, ge=0, description="Time from red health to the refusal of new requests, when it stops."
    )
    max_waiting: int = Field(default=256, ge=1, description="Requests of one priority that wait; more are refused.")
    overcommit: float = Field(
        default=2.0, gt=0, description="Tokens that run at once, as a multiple of what the decode workers can hold."
    )
    prefix_sharing: Literal["tenant", "none"] = Field(
        default="tenant", description="Whose requests may find a prompt's kept pages: its tenant's, or none but itself."
    )
    tenant_weights: Annotated[dict[str, float], BeforeValidator(_weights)] = Field(
        default={}, description="Shares of tenants while others wait, as NAME=WEIGHT with commas; 1 where not named."
    )
    max_request_tokens: int | None = Field(
        default=None, ge=2, description="Tokens of one request, prompt and output; default: no bound."
    )
    max_request_kv_mib: float | None = Field(
        default=None, gt=0, description="KV of one request on the wire, in MiB; default: no bound."
    )
    max_request_s: float | None = Field(
        default=None, gt=0, description="Time of one request from arrival to end; default: no bound."
    )
    sign_of_life_s: float = Field(
        default=10.0, gt=0, description="Silence after which an answer's stream gets an empty event."
    )
    max_prompt_bytes: int = Field(
        default=InputLimits.max_prompt_bytes, ge=1, description="UTF-8 bytes of a prompt or chat."
    )
    max_chat_messages: int = Field(default=InputLimits.max_chat_messages, ge=1, description="Messages of a chat.")
    parse_special: bool = Field(
        default=InputLimits.parse_special,
        description="Whether control tokens spelled in a chat message are such, not text.",
    )
    chat_template: str | None = Field(
        default=None, description="File of a chat template that is used instead of the model's own."
    )
    preflight: bool = Field(
        default=True, description="Whether a worker must pass a canary request before it gets others."
    )
    jobs_db: str | None = Field(
        default=None,
        description="URL of the database of jobs; none: no jobs; default: jobs.db in ~/.local/state/isthmus.",
    )
    jobs: JobsSettings = Field(default=JobsSettings(), description="Limits and periods of jobs.")
    access: AccessSettings = Field(default=AccessSettings(), description="Who may ask: API keys and tokens.")

    @property
    def input_limits(self) -> InputLimits:
        """What the gateway takes as text."""
        return InputLimits(
            max_prompt_bytes=self.max_prompt_bytes,
            max_chat_messages=self.max_chat_messages,
            parse_special=self.parse_special,
        )

    @field_validator("workers")
    @classmethod
    def _can_be_watched(cls, workers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_address(worker, to_dial=True) for worker in workers)

    @field_validator("supervisor")
    @classmethod
    def _can_be_dialled(cls, value: str | None) -> str | None:
        return value if value is None else checked_address(value, to_dial=True)

    @field_validator("http_listen", mode="before")
    @classmethod
    def _or_none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("admin_listen", "health_listen", "http_listen")
    @classmethod
    def _can_be_bound(cls, value: str | None) -> str | None:
        return value if value is None else checked_address(value)

    @field_validator("tenant_weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for tenant, weight in weights.items():
            if not weight > 0:
                raise ValueError(f"the weight of tenant {tenant!r} is {weight:g}; allowed: more than 0")
        return weights
