"""What a person does to a running cluster: drain a worker, change its role, change how many there are.

The gateway passes drains and flips to the workers themselves, so they work for a list of workers as for Ray. Only
the supervisor that started the workers can start more, and knows that one it drained shall not come back.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Protocol

import grpc.aio

from ...proto.errors import Incompatible, InvalidRequest, IsthmusError, NotFound, Unavailable, shown
from ...proto.rpc.statuses import PeerBug, error_of
from ...proto.worker_pb2 import (
    WORKER_HEALTH_READY,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    DrainRequest,
    DrainResponse,
    FlipRequest,
    ScaleResponse,
    WorkerReport,
    WorkerRole,
)
from ...proto.worker_pb2_grpc import WorkerStub
from ...worker.service import DRAIN_S
from ..fleet.registry import Fleet

BACK_S = 30.0  # for a flipped worker to be back in its other role, its canary included
MAX_WORKERS = 1_000  # of a role, that `scale` may be asked for
_ANSWER_S = 10.0  # for an answer beyond the time that a drain may take


class WorkerManager(Protocol):
    """Started the workers and keeps them running (`launch/worker_group.py`, `launch/detached/worker_pool.py`)."""

    may_be_empty: bool  # whether a pool may have no worker

    def wanted(self) -> Mapping[str, int]:
        """How many workers of each role there shall be."""
        ...

    async def drain(self, address: str, timeout_s: float) -> DrainResponse:
        """Drains a worker and ends it for good."""
        ...

    def set_role(self, address: str, role: WorkerRole.ValueType) -> None:
        """A worker has another role from now on, after a restart too."""
        ...

    async def scale(self, prefill: int | None, decode: int | None, timeout_s: float) -> ScaleResponse:
        """Starts and drains workers until there are so many."""
        ...


class Operations:
    """Carries out orders for the workers of a fleet; `manager` is set where one started them."""

    def __init__(self, fleet: Fleet, supervisor: str | None = None) -> None:
        """`supervisor`: the address of the one that the orders go to, where it is a process apart."""
        self._fleet, self._supervisor = fleet, supervisor
        self._scaling = asyncio.Lock()
        self._flips: set[asyncio.Task[WorkerReport]] = set()
        self.manager: WorkerManager | None = None

    async def drain(self, worker: str, timeout_s: float = DRAIN_S) -> DrainResponse:
        """Drains a worker, by id or address, and ends it. NotFound where there is none of that name."""
        self._check_owner()
        address = self._find(worker).address
        if self.manager is not None:
            return await self.manager.drain(address, timeout_s)
        return await self.drain_at(address, timeout_s)

    async def drain_at(self, address: str, timeout_s: float) -> DrainResponse:
        """Has the worker at an address drain itself; raises what it answers."""
        stub = WorkerStub(self._channel(address))
        try:
            return await stub.Drain(DrainRequest(timeout_s=timeout_s), timeout=timeout_s + _ANSWER_S)
        except grpc.aio.AioRpcError as error:
            raise _as_ours(address, error) from None

    async def flip(self, worker: str, role: WorkerRole.ValueType, timeout_s: float = DRAIN_S) -> WorkerReport:
        """Gives a worker a role; returns its report once it is ready in that role.

        InvalidRequest for no such role; Incompatible where it is the last one of its role (the cluster could serve
        nothing), or where it cannot take the other one: then it goes on in its own.
        """
        if role not in (WORKER_ROLE_PREFILL, WORKER_ROLE_DECODE):
            raise InvalidRequest(
                f"role is {role}; allowed: {WORKER_ROLE_PREFILL} (prefill), {WORKER_ROLE_DECODE} (decode)"
            )
        self._check_owner()
        status = self._find(worker)
        if status.role == role:
            return status
        same = [other for other in self._fleet.statuses() if other.role == status.role]
        if len(same) == 1:
            raise Incompatible(f"{status.worker_id} is the only worker of its role; start another one first")
        flipping = asyncio.create_task(self._flip(status, role, timeout_s), name=f"flip {status.worker_id}")
        self._flips.add(flipping)
        flipping.add_done_callback(self._flip_ended)
        return await asyncio.shield(flipping)  # the worker goes on too where the caller goes away

    async def stop(self) -> None:
        """Ends the flips that are waited for here; the workers carry them out all the same."""
        for flipping in self._flips:
            flipping.cancel()
        await asyncio.gather(*self._flips, return_exceptions=True)

    def _flip_ended(self, flipping: "asyncio.Task[WorkerReport]") -> None:
        self._flips.discard(flipping)
        _ = flipping.cancelled() or flipping.exception()  # nobody may wait for it any more

    async def _flip(self, status: WorkerReport, role: WorkerRole.ValueType, timeout_s: float) -> WorkerReport:
        stub, address = WorkerStub(self._channel(status.address)), status.address
        self._set_role(address, role)
        try:
            await stub.Flip(FlipRequest(role=role, timeout_s=timeout_s), timeout=timeout_s + _ANSWER_S)
            return await self._wait_ready(status, role)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:  # the order may be carried out still
                self._set_role(address, status.role)
            raise _as_ours(address, error) from None
        except Incompatible:
            self._set_role(address, status.role)
            raise

    def _set_role(self, address: str, role: WorkerRole.ValueType) -> None:
        if self.manager is not None:
            with contextlib.suppress(NotFound):  # it was drained, or started anew elsewhere
                self.manager.set_role(address, role)

    async def scale(self, prefill: int | None, decode: int | None, timeout_s: float = DRAIN_S) -> ScaleResponse:
        """Changes the number of workers; Incompatible where they are a given list."""
        for name, count in (("prefill", prefill), ("decode", decode)):
            if count is not None and count > MAX_WORKERS:
                raise InvalidRequest(f"{name} is {count}; allowed: at most {MAX_WORKERS} workers")
        self._check_owner()
        if self.manager is None:
            raise Incompatible(
                "this gateway was given a list of workers and cannot start any: start them with `isthmus worker`, name "
                "all in --workers, and end one with `isthmus drain`; `isthmus up` runs a cluster that scales"
            )
        if (prefill == 0 or decode == 0) and not self.manager.may_be_empty:
            raise Incompatible("a cluster needs one worker of each role at least")
        async with self._scaling:
            return await self.manager.scale(prefill, decode, timeout_s)

    def _check_owner(self) -> None:
        if self._supervisor is not None:
            raise Incompatible(
                f"this gateway's workers are those of the supervisor at {self._supervisor}: give the order there, "
                f"with --admin {self._supervisor}"
            )

    def _find(self, worker: str) -> WorkerReport:
        statuses = self._fleet.statuses()
        found = [status for status in statuses if worker in (status.worker_id, status.address)]
        if not found:
            known = ", ".join(status.worker_id for status in statuses) or "none"
            raise NotFound(f"no worker {shown(worker)}; there are: {known}")
        if len(found) > 1:
            raise NotFound(
                f"several workers are called {shown(worker)}; name one by its address, as in `isthmus status`"
            )
        return found[0]

    def _channel(self, address: str) -> grpc.aio.Channel:
        try:
            return self._fleet.channel(address)
        except KeyError:
            raise Unavailable(f"worker {address} left") from None

    async def _wait_ready(self, before: WorkerReport, role: WorkerRole.ValueType) -> WorkerReport:
        status, address = None, before.address
        try:
            async with asyncio.timeout(BACK_S):
                while True:
                    change = self._fleet.change
                    status = next((s for s in self._fleet.statuses() if s.address == address), None)
                    if status is not None and (status.role, status.health) == (role, WORKER_HEALTH_READY):
                        return status
                    if status is not None and status.flip_failure and status.instance != before.instance:
                        raise Incompatible(f"{status.worker_id} goes on in its role: {status.flip_failure}")
                    await change.wait()
        except TimeoutError:
            why = f": {status.reason}" if status is not None and status.reason else ""
            raise Unavailable(f"worker {address} is not back in its new role after {BACK_S:g} s{why}") from None


def _as_ours(address: str, error: grpc.aio.AioRpcError) -> IsthmusError:
    known = error_of(error, f"worker {address}")
    return Unavailable(str(known)) if isinstance(known, PeerBug) else known
