"""The host of a worker in a process: it owns the loaded model, and the worker around it, of one role or the other.

A flip drains the worker, ends it and builds one of the other role on the same model at the same address: the weights
are read once for the life of the process. No Ray in here.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError

from ...model.phases import phase
from ...proto.errors import Incompatible, InvalidRequest, IsthmusError
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import WorkerRole
from ...worker.server import Drained, WorkerServer
from ...worker.service import OrderServicer
from ...worker.start import gently
from ..config import CONFIG_OF, SHARED
from ..fleet.report import ROLE_OF, Role
from ..sources import explain

if TYPE_CHECKING:
    from ...model.model import Model

log = logging.getLogger(__name__)


class Worker(Protocol):
    """What prefill and decode workers have in common."""

    server: WorkerServer

    @property
    def address(self) -> str: ...
    @property
    def model(self) -> "Model": ...
    async def prepare(self, model: "Model") -> None: ...
    async def start(self, model: "Model | None" = None) -> None: ...
    async def drain(self, timeout_s: float) -> Drained: ...
    async def stop(self) -> None: ...


def make_worker(role: Role, settings: Mapping[str, Any]) -> Worker:
    """A worker that is not started yet; imports what it needs. InvalidRequest where a setting is wrong."""
    try:
        config = CONFIG_OF[role](**settings)
    except ValidationError as error:
        raise InvalidRequest(explain(error, CONFIG_OF[role])) from None
    if role == "prefill":
        from ...prefill.config import PrefillConfig
        from ...prefill.worker import PrefillWorker

        assert isinstance(config, PrefillConfig)
        return PrefillWorker(config)
    from ...decode.config import DecodeConfig
    from ...decode.worker import DecodeWorker

    assert isinstance(config, DecodeConfig)
    return DecodeWorker(config)


def settings_by_role(
    role: Role, settings: Mapping[str, Any], other: Mapping[str, Any] | None = None
) -> dict[Role, Mapping[str, Any]]:
    """Settings by role; `other`: those of the other one, by default what of `settings` means the same there."""
    opposite: Role = "decode" if role == "prefill" else "prefill"
    if other is None:
        other = {key: value for key, value in settings.items() if key in SHARED}
    return {role: settings, opposite: other}


class RoleHost:
    """Runs one worker at a time. Belongs to one event loop; `stop` ends the worker whatever happened in `start`."""

    def __init__(
        self,
        role: Role,
        settings: Mapping[Role, Mapping[str, Any]],
        end_process: Callable[[], None] | None = None,
    ) -> None:
        """`settings` are those of both roles; `end_process` is called where the worker can serve no more."""
        self.role: Role = role
        self.drained = asyncio.Event()  # set once the worker was drained by order: the process has nothing left to do
        self._settings = settings
        self._end_process = end_process
        self._worker: Worker | None = None
        self._prepared: Worker | None = None  # for the other role, while a flip is under way
        self._tasks = Tasks()
        self._flipping: asyncio.Task[None] | None = None
        self._started = False
        self._process, self._roles = secrets.token_hex(8), itertools.count(1)

    @property
    def address(self) -> str:
        """host:port of the worker for others, once started."""
        assert self._worker is not None, "not started"
        return self._worker.address

    @property
    def server(self) -> WorkerServer:
        """Of the worker that runs now."""
        assert self._worker is not None, "not started"
        return self._worker.server

    async def start(self) -> None:
        """Loads the model and serves. Raises what that raises."""
        with phase("imports"):
            worker = await gently(make_worker, self.role, self._settings[self.role])
        await self._run(worker, None)

    async def drain(self, timeout_s: float) -> Drained:
        """Takes no new work, waits at most so long for what runs, and hands over the rest."""
        return await self._worker.drain(timeout_s) if self._worker is not None else Drained(0, 0)

    async def stop(self) -> None:
        """Ends the worker at once."""
        if self._flipping is not None:
            await asyncio.wait({self._flipping})
        if self._worker is not None:
            await self._worker.stop()

    # What the process's own socket asks (`local_orders.py`, `Host`).

    @property
    def running(self) -> OrderServicer | None:
        """The service of the worker that serves now; None where none does yet."""
        return self._worker.server.service if self._worker is not None and self._started else None

    async def settle(self) -> None:
        """Waits for a flip that is under way."""
        if self._flipping is not None and not self._flipping.done():
            await asyncio.wait({self._flipping})

    # What others may order of this worker (`worker/service.py`, `Orders`).

    def left(self) -> None:
        """The worker was drained by order, and the caller has its answer."""
        self.drained.set()

    def flip(self, role: WorkerRole.ValueType) -> None:
        """The worker was drained for it: begins to change the role. Two such orders at once are one: they would build
        two workers at one address."""
        if self._flipping is None or self._flipping.done():
            about = f"to {ROLE_OF[role]}"
            self._flipping = self._tasks.once("flip", partial(self._flip_logged, ROLE_OF[role]), about=about)

    async def _flip_logged(self, role: Role) -> None:
        with contextlib.suppress(Incompatible):  # the log and the report have it
            if role != self.role:
                await self._flip(role)

    async def prepare_flip(self, role: WorkerRole.ValueType) -> bool:
        """Makes the worker of the other role, but for its pool; whether a flip to this role changes anything.

        InvalidRequest where there is no such role, Incompatible where this worker cannot take it.
        """
        if role not in ROLE_OF:
            raise InvalidRequest("the role to flip to is not prefill or decode")
        wanted = ROLE_OF[role]
        if self._flipping is not None and not self._flipping.done():
            raise Incompatible("the worker is changing its role already")
        if wanted == self.role:
            return False
        await self._prepare(wanted)
        return True

    async def _prepare(self, role: Role) -> None:
        assert self._worker is not None, "not started"
        model, listen = self._worker.model, _addresses(self._worker.server)
        try:
            prepared = await gently(make_worker, role, {**self._settings[role], **listen})
            await prepared.prepare(model)
        except Exception as error:
            if not isinstance(error, IsthmusError):
                log.exception("the worker could not be made a %s worker", role)
            raise Incompatible(f"cannot become a {role} worker: {_reason(error)}") from None
        self._prepared = prepared

    async def _flip(self, role: Role) -> None:
        """Ends the worker and starts the prepared one of the other role. Where that fails the worker is started anew
        in the role that it had, and Incompatible says why."""
        ended, prepared = self._worker, self._prepared
        assert ended is not None and prepared is not None
        model, listen = ended.model, _addresses(ended.server)
        await ended.stop()
        self._worker = ended = self._prepared = None
        self._started = False
        await asyncio.to_thread(gc.collect)  # its pool goes before there is another one
        try:
            await self._run(prepared, model)
            self.role = role
        except Exception as error:
            log.exception("the worker could not become a %s worker and goes on as a %s worker", role, self.role)
            await self._go_on(prepared, listen, model, reason := _reason(error))
            raise Incompatible(f"cannot become a {role} worker: {reason}") from None

    async def _go_on(self, failed: Worker, listen: Mapping[str, str], model: "Model", reason: str) -> None:
        """Starts the worker anew in the role that it had; a process that cannot do that either ends."""
        try:
            await failed.stop()
            self._worker = failed = None  # pyright: ignore[reportAssignmentType]
            await asyncio.to_thread(gc.collect)
            worker = await gently(make_worker, self.role, {**self._settings[self.role], **listen})
            worker.server.flip_failure = reason
            await self._run(worker, model)
        except Exception:
            log.exception("the worker cannot go on as a %s worker either", self.role)
            if self._end_process is None:
                raise
            self._end_process()

    async def _run(self, worker: Worker, model: "Model | None") -> None:
        worker.server.end_process = self._end_process
        worker.server.orders = self
        worker.server.instance = f"{self._process}.{next(self._roles)}"
        self._worker = worker
        await worker.start(model)
        self._started = True


def _addresses(server: WorkerServer) -> dict[str, str]:
    """Settings of a worker that shall listen where this one does."""
    health = server.bound_health
    return {"listen": server.bound} | ({"health_listen": health} if health is not None else {})


def _reason(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split()) or type(error).__name__
