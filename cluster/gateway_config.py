"""Settings of the gateway: where requests may run and what becomes of those that lose their worker."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .jobs.settings import JobsSettings
from .router.policies import LocalPrefill, Policy
from .text.served import InputLimits


class GatewayConfig(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy = "cost"  # how workers are chosen (docs/routing.md)
    local_prefill: LocalPrefill = "when_cheaper"  # whether decode workers may compute prompts themselves
    replays: int = Field(default=16, ge=0)  # times that one request may be placed again after a worker was lost
    restart_wait_s: float = Field(default=30.0, ge=0)  # how long a request waits for lost workers to be back
    max_waiting: int = Field(default=256, ge=1)  # requests of one priority that wait for their turn; more are refused
    overcommit: float = Field(default=2.0, gt=0)  # tokens that run at once, in what the decode workers can hold
    tenant_weights: dict[str, float] = {}  # share of the tokens of a tenant against another's while both wait; else 1
    max_request_tokens: int | None = Field(default=None, ge=2)  # prompt and output of one request
    max_request_kv_mib: float | None = Field(default=None, gt=0)  # their KV, as measured on the wire
    max_request_s: float | None = Field(default=None, gt=0)  # from arrival to end
    sign_of_life_s: float = Field(default=10.0, gt=0)  # a silent stream of an answer gets an event without tokens
    max_prompt_bytes: int = Field(default=1 << 20, ge=1)  # UTF-8 of a prompt or chat; more is refused before any work
    max_chat_messages: int = Field(default=4096, ge=1)
    parse_special: bool = False  # whether a control token that a chat message spells is one, and not text
    preflight: bool = True  # whether a worker must pass a canary before it gets requests (cluster/fleet/preflight.py)
    jobs_db: str | None = None  # URL of the database of jobs; none: no jobs
    jobs: JobsSettings = JobsSettings()

    @property
    def input_limits(self) -> InputLimits:
        """What the gateway takes as text."""
        return InputLimits(
            max_prompt_bytes=self.max_prompt_bytes,
            max_chat_messages=self.max_chat_messages,
            parse_special=self.parse_special,
        )

    @field_validator("tenant_weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for tenant, weight in weights.items():
            if not weight > 0:
                raise ValueError(f"the weight of tenant {tenant!r} is {weight:g}; allowed: more than 0")
        return weights
