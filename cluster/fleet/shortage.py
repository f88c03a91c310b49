"""Requests of a gateway that wait for a pool which has no worker: what the supervisor starts one for."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

from ..router.policies import LocalPrefill
from ..router.routing_table import RoutingTable
from .report import Role

PAUSE_S = 1.0  # a request that waits looks about so often, or is done
HOLD_S = 10.0  # a request that was refused for it counts for so long


class Shortage:
    """Counts what waits; belongs to one event loop."""

    def __init__(self, table: RoutingTable, local_prefill: LocalPrefill) -> None:
        self._table, self._local_prefill = table, local_prefill
        self._waiting = 0
        self._until_s = 0.0
        self.change = asyncio.Event()  # is set where some begin to wait; a new one replaces it

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the time that a request waits for workers."""
        self._waiting += 1
        self._tell()
        try:
            yield
        finally:
            self._waiting -= 1
            self._until_s = max(self._until_s, time.monotonic() + PAUSE_S)

    def refused(self) -> None:
        """A request was refused because of it."""
        self._until_s = time.monotonic() + HOLD_S
        self._tell()

    def empty(self) -> frozenset[Role]:
        """The roles that have no worker, and that requests need."""
        lacking = set[Role]()
        if not len(self._table.decode):
            lacking.add("decode")
        if not len(self._table.prefill) and self._local_prefill == "never":
            lacking.add("prefill")
        return frozenset(lacking)

    def roles(self) -> frozenset[Role]:
        """Those of them that requests wait for now."""
        return self.empty() if self._waiting or time.monotonic() < self._until_s else frozenset()

    def _tell(self) -> None:
        self.change.set()
        self.change = asyncio.Event()
