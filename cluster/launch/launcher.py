"""What the supervisor needs of whatever starts workers: Ray, or a test."""

from typing import Protocol

from ...worker.service import Drained
from ..fleet.report import Role


class RunningWorker(Protocol):
    """A worker somewhere, under a name that outlives its process."""

    name: str

    async def address(self) -> str:
        """host:port, once it serves; raises what its start raised."""
        ...

    async def activity(self) -> str:
        """What its start is doing, in a few words; "" where there is nothing to tell."""
        ...

    async def wait_closed(self) -> bool:
        """Returns when its process has ended; whether it was drained by an order on its host."""
        ...

    async def drain(self, timeout_s: float) -> Drained:
        """Takes no new work, waits at most so long for what runs, and hands over the rest."""
        ...

    async def stop(self) -> None:
        """Ends it at once."""
        ...


class Launcher(Protocol):
    """Starts workers."""

    @property
    def one_host(self) -> bool:
        """Whether all workers run on this host: one that was drained there has no other place."""
        ...

    async def start(self) -> None:
        """Makes ready to launch; also anew, after `close`."""
        ...

    async def launch(self, role: Role, name: str) -> RunningWorker:
        """Asks for one worker; it is there when its `address` returns."""
        ...

    async def lost(self) -> None:
        """Returns once it can start and restart nothing any more."""
        ...

    async def close(self) -> None:
        """Ends all workers."""
        ...
