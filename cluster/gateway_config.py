"""Settings of the gateway: where requests may run and what becomes of those that lose their worker."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .jobs.settings import JobsSettings

LocalPrefill = Literal["never", "when_cheaper", "always"]
Policy = Literal["cost", "round-robin", "least-requests", "least-queued-tokens", "prefix-affinity"]


class GatewayConfig(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy = "cost"  # how workers are chosen (docs/routing.md)
    local_prefill: LocalPrefill = "when_cheaper"  # whether decode workers may compute prompts themselves
    replays: int = Field(default=16, ge=0)  # times that one request may be placed again after a worker was lost
    restart_wait_s: float = Field(default=30.0, ge=0)  # how long a request waits for lost workers to be back
    preflight: bool = True  # whether a worker must pass a canary request before it gets others (cluster/preflight.py)
    jobs_db: str | None = None  # URL of the database of jobs; none: no jobs
    jobs: JobsSettings = JobsSettings()
