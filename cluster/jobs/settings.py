"""What a gateway's jobs may take, and its periods."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class JobsSettings(BaseModel):
    """Limits are for each tenant, but for `max_tenants` and what runs. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tenants: int = Field(default=10_000, ge=1)  # that have jobs, ended ones included
    max_jobs: int = Field(default=10_000, ge=1)  # that have not ended
    max_queued_tokens: int = Field(default=100_000_000, ge=1)  # prompts and max_tokens of requests that have not ended
    max_stored_bytes: int = Field(default=4 << 30, ge=1)  # requests, events and results of all jobs that are kept
    max_running: int = Field(default=256, ge=1)  # requests at once of interactive and standard jobs
    max_running_batch: int = Field(default=32, ge=1)  # requests at once of batch jobs, when nothing else runs
    lease_s: float = Field(default=5.0, gt=0)  # a gateway that is silent for so long has lost its jobs to the others
    sweep_s: float = Field(default=1.0, gt=0)  # between looks for deadlines, cancelled jobs and dead gateways
    sign_of_life_s: float = Field(default=10.0, gt=0)  # a silent watcher gets a response without events
    prune_s: float = Field(default=10.0, gt=0)  # between looks for jobs to erase
    retention_s: float = Field(default=7 * 86400.0, ge=0)  # of ended jobs, where a job does not say


def chosen_url(*named: str | None) -> str | None:
    """The database of jobs: the first one named, else ISTHMUS_JOBS_DB, else a file in the user's state folder.

    None where that says "none": a gateway without jobs.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    default = f"sqlite:///{state / 'isthmus' / 'jobs.db'}"
    url = next(filter(None, [*named, os.environ.get("ISTHMUS_JOBS_DB")]), default)
    return None if url == "none" else url
