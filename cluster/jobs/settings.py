"""What a gateway's jobs may take, and its periods."""

from pydantic import Field

from ...proto.security.state import user_state
from ...worker.config import Settings


class JobsSettings(Settings):
    """Limits are for each tenant, but for `max_tenants` and what runs."""

    max_tenants: int = Field(default=10_000, ge=1, description="Tenants that have jobs, ended ones included.")
    max_jobs: int = Field(default=10_000, ge=1, description="Jobs that have not ended.")
    max_queued_tokens: int = Field(
        default=100_000_000, ge=1, description="Prompts and max_tokens of requests that have not ended, in tokens."
    )
    max_stored_bytes: int = Field(
        default=4 << 30, ge=1, description="Requests, events and results of all jobs that are kept."
    )
    max_running: int = Field(
        default=256, ge=1, description="Requests of interactive and standard jobs that run at once."
    )
    max_running_batch: int = Field(
        default=32, ge=1, description="Requests of batch jobs that run at once when nothing else runs."
    )
    lease_s: float = Field(
        default=5.0, gt=0, description="Silence after which a gateway has lost its jobs to the others."
    )
    sweep_s: float = Field(
        default=1.0, gt=0, description="Time between looks for deadlines, cancelled jobs and dead gateways."
    )
    sign_of_life_s: float = Field(
        default=10.0, gt=0, description="Silence after which a watcher gets a response without events."
    )
    prune_s: float = Field(default=10.0, gt=0, description="Time between looks for jobs to erase.")
    retention_s: float = Field(
        default=7 * 86400.0, ge=0, description="Time that ended jobs are kept, where a job does not say."
    )


def database_url(named: str | None) -> str | None:
    """The database of jobs: the one that is named, else a file in the user's state folder; None where the name is
    "none": a gateway without jobs."""
    if not named:
        return f"sqlite:///{user_state() / 'jobs.db'}"
    return None if named == "none" else named
