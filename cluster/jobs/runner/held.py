"""Jobs whose tenants have used up their limits: they wait here, beside those that may run, until there is room again.

Pure: the time comes in as an argument.
"""

from collections.abc import Iterator

from .active import ActiveJob


class HeldJobs:
    """By tenant, each until a time. No further job of a held tenant is taken from the database."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}
        self._jobs: dict[str, list[ActiveJob]] = {}

    @property
    def tenants(self) -> list[str]:
        """Those that are held."""
        return list(self._until_s)

    def holds(self, tenant: str) -> bool:
        """Whether the tenant's requests may not begin now."""
        return tenant in self._until_s

    def hold(self, tenant: str, until_s: float) -> None:
        """The tenant waits until then; one that waits already may wait for less."""
        if tenant in self._jobs or until_s:
            self._until_s[tenant] = min(until_s, self._until_s.get(tenant, until_s))

    def add(self, job: ActiveJob) -> None:
        """A job of a tenant that is held."""
        self._jobs.setdefault(job.tenant, []).append(job)

    def remove(self, job: ActiveJob) -> None:
        """The job is not to be run any more, if it is here."""
        jobs = self._jobs.get(job.tenant, [])
        if job in jobs:
            jobs.remove(job)

    def released(self, now_s: float) -> Iterator[ActiveJob]:
        """The jobs whose time has come; they are held no more."""
        for tenant in [tenant for tenant, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[tenant]
            yield from self._jobs.pop(tenant, [])
