"""`isthmus supervise` as a process to be fuzzed: the real server, on a Ray where no worker finds room."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from faults.cluster import Node, processes

from isthmus.cluster.cli.terminal.options import configure_logs
from isthmus.cluster.config import load_config
from isthmus.cluster.fleet.report import Role
from isthmus.cluster.launch.detached.desired import Desired
from isthmus.cluster.launch.detached.server import SupervisorServer
from isthmus.proto.errors import NotFound
from isthmus.proto.security.state import LOCAL
from isthmus.worker.service import Drained


class Waiting:
    """A worker that waits for room."""

    def __init__(self, role: Role, name: str) -> None:
        self.name = name
        self._role, self._ended = role, asyncio.Event()

    async def address(self) -> str:
        await self._ended.wait()
        raise NotFound(f"{self.name} has ended")

    async def activity(self) -> str:
        return ""

    async def role(self) -> Role:
        return self._role

    async def wait_closed(self) -> None:
        await self._ended.wait()

    async def drain(self, timeout_s: float) -> Drained:
        return Drained(finished=0, handed_over=0)

    async def stop(self) -> None:
        self._ended.set()


class FullRay:
    """No host of it has room for a worker."""

    async def start(self) -> None:
        pass

    async def lost(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass

    async def launch(self, role: Role, name: str) -> Waiting:
        return Waiting(role, name)

    async def find(self, name: str) -> Waiting:
        raise NotFound(name)

    async def existing(self) -> list[str]:
        return []

    async def waits_for(self, worker: Waiting, role: Role) -> str:
        return "no host has room"

    async def request(self, counts: Mapping[Role, int]) -> None:
        pass

    async def load(self) -> Desired | None:
        return None

    async def save(self, desired: Desired) -> None:
        pass


class SupervisorNode(Node):
    """The process, under its address."""

    def start(self) -> None:
        """Starts it (again)."""
        self.process = processes().Process(target=_child, args=(self.address, self.log), daemon=True)
        self.process.start()
        self.starts += 1


def _child(address: str, log: Path) -> None:
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    configure_logs("warning")
    asyncio.run(_serve(address))


async def _serve(address: str) -> None:
    flags = {"cluster_id": LOCAL, "prefill": 1, "decode": 0, "supervisor": {"listen": address}}
    server = SupervisorServer(load_config(None, flags), FullRay())
    await server.start()
    await asyncio.Event().wait()
