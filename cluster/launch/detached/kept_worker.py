"""A detached worker that is kept running, and what that needs of Ray, or of a test."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ....proto.backoff import Restarts
from ....worker.service import Drained
from ...fleet.report import Role
from ..worker_group import HEALTHY_S, LAST_RESTART_PAUSE_S, RESTART_PAUSE_S
from .desired import Desired


class Detached(Protocol):
    """A worker that outlives this process (`ray_cluster.RayWorker`)."""

    name: str

    async def address(self) -> str: ...
    async def activity(self) -> str: ...
    async def role(self) -> Role: ...
    async def wait_closed(self) -> bool: ...
    async def drain(self, timeout_s: float) -> Drained: ...
    async def stop(self) -> None: ...


class DetachedLauncher(Protocol):
    """Starts them, and finds them again (`ray_pool.RayPool`)."""

    async def launch(self, role: Role, name: str) -> Any: ...
    async def find(self, name: str) -> Any: ...
    async def existing(self) -> list[str]: ...
    async def waits_for(self, worker: Any, role: Role) -> str: ...
    async def request(self, counts: Mapping[Role, int]) -> None: ...
    async def load(self) -> Desired | None: ...
    async def save(self, desired: Desired) -> None: ...


@dataclass(eq=False)
class KeptWorker:
    """A worker that shall run."""

    name: str
    role: Role
    running: Detached | None = None
    address: str = ""  # while it is there, as far as is known
    doing: str = ""  # why it is not there
    ending: bool = False  # it is drained, to be ended
    keeper: asyncio.Task[None] | None = None
    launching: asyncio.Lock = field(default_factory=asyncio.Lock)
    restarts: Restarts = field(default_factory=lambda: Restarts(RESTART_PAUSE_S, LAST_RESTART_PAUSE_S, HEALTHY_S))

    def reason(self, now_s: float) -> str:
        """Why it is not there, in one line; "" where it is."""
        if self.address:
            return ""
        waiting = self.restarts.reason(now_s) if self.restarts.ends and self.running is None else ""
        return ": ".join(filter(None, (waiting, self.doing))) or "is being started"
