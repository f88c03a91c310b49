"""The states of a job, and the one table of which may follow which. Requests of a job have the same states."""

from enum import IntEnum

from ...proto.errors import IllegalState


class JobState(IntEnum):
    """As `JobState` on the wire (proto/jobs.proto)."""

    QUEUED = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    CANCELLED = 5
    EXPIRED = 6

    @property
    def ended(self) -> bool:
        """Whether no state follows."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.EXPIRED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.EXPIRED: frozenset(),
}
OPEN = tuple(state for state in JobState if TRANSITIONS[state])


def check_transition(job_id: str, now: JobState, then: JobState) -> None:
    """IllegalState unless a job that is `now` may become `then`."""
    if then not in TRANSITIONS[now]:
        allowed = ", ".join(sorted(state.name for state in TRANSITIONS[now])) or "nothing: it has ended"
        raise IllegalState(f"job {job_id} is {now.name} and cannot become {then.name}; allowed: {allowed}")
