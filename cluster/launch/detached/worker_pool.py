"""The detached workers of a cluster: found again, started, kept running, scaled.

One task keeps each worker: it starts what is not there, waits as long as Ray has no host for it, and starts it anew
where its process or its host is gone. No worker waits for another one, and none ends the supervisor. What shall run is
written down with Ray at each change (`desired.py`): a supervisor that is started anew goes on with that.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Collection, Mapping
from functools import partial

from ....proto.errors import Incompatible, IsthmusError, NotFound, Unavailable
from ....proto.supervisor_pb2 import ListedWorker
from ....proto.tasks import Tasks
from ....proto.worker_pb2 import ClusterStatus, DrainResponse, ScaleResponse, WorkerReport, WorkerRole
from ....worker.service import DRAIN_S, Drained
from ...fleet.registry import Fleet
from ...fleet.report import NUMBER_OF, ROLE_OF, ROLES, Role
from ...fleet.supervised import fill_listed
from ..progress import ProgressStep, no_progress, with_activity
from ..worker_group import GONE_S
from .desired import Desired, Wanted
from .kept_worker import DetachedLauncher, KeptWorker

log = logging.getLogger(__name__)

ANSWER_S = 5.0  # for a worker that is placed to say where it is, and what it does
RETRY_S = 1.0  # before what Ray could not keep is given to it again


class WorkerPool:
    """Adopts, keeps, scales and drains workers: what orders ask for (`WorkerManager`)."""

    may_be_empty = True

    def __init__(self, launcher: DetachedLauncher, fleet: Fleet, tasks: Tasks, configured: Mapping[Role, int]) -> None:
        """`fleet` gets every worker; `tasks` owns what keeps them; `configured`: numbers of the settings file."""
        self._launcher, self._fleet, self._tasks = launcher, fleet, tasks
        self._configured = dict(configured)
        self._workers: list[KeptWorker] = []
        self._unsaved = asyncio.Event()
        self.change = asyncio.Event()  # is set at the next change; a new one replaces it

    async def adopt(self) -> None:
        """Takes over what runs, and begins to start what is missing. Returns once all of that is listed.

        The numbers are those that the supervisor before had; where the settings file has others since, these.
        """
        before, existing = await self._launcher.load(), await self._launcher.existing()
        wanted = dict(before.workers) if before is not None else {}
        for name in existing:
            wanted.setdefault(name, Wanted(_role_of(name)))
        for name, (role, address) in wanted.items():
            worker = self._add(role, name, address if name in existing else "")
            if name in existing:
                with contextlib.suppress(NotFound):
                    worker.running = await self._launcher.find(name)
        if before is None:
            counts: dict[Role, int] = {role: max(self._configured[role], len(self._of(role))) for role in ROLES}
        else:
            changed = [role for role in ROLES if before.configured.get(role) != self._configured[role]]
            counts = {role: self._configured[role] if role in changed else len(self._of(role)) for role in ROLES}
        surplus = self._plan(counts)[1]
        self._tasks.start("keep what is wanted", self._save)
        for worker in surplus:
            self._tasks.once("end a worker", partial(self._end_by_itself, worker), about=worker.name)

    def listed(self) -> list[ListedWorker]:
        """All workers, as gateways are told of them."""
        now_s = time.monotonic()
        return [
            ListedWorker(
                name=worker.name, role=NUMBER_OF[worker.role], address=worker.address, reason=worker.reason(now_s)
            )
            for worker in self._workers
        ]

    def fill_status(self, status: ClusterStatus) -> None:
        """Says how many workers there shall be, and which of them are not there."""
        fill_listed(status, self.listed())
        status.wanted.update(self.wanted())

    def wanted(self) -> dict[str, int]:
        """How many workers of each role there shall be."""
        return {role: len(self._of(role)) for role in ROLES}

    async def drain(self, address: str, timeout_s: float) -> DrainResponse:
        """Drains a worker and ends it for good. Incompatible where it is the last one of its role."""
        worker = self._at(address)
        if len(self._of(worker.role)) == 1:
            why = f"{worker.name} is the only {worker.role} worker; to have none: isthmus scale {worker.role}=0"
            raise Incompatible(why)
        worker.ending = True
        self._changed()
        drained = await self._end(worker, timeout_s)
        return DrainResponse(finished=drained.finished, handed_over=drained.handed_over)

    def set_role(self, address: str, role: WorkerRole.ValueType) -> None:
        """A worker has another role from now on, after a restart too."""
        self._at(address).role = ROLE_OF[role]
        self._changed()

    async def scale(self, prefill: int | None, decode: int | None, timeout_s: float) -> ScaleResponse:
        """Begins to start the workers that are missing, and drains those too many that are cheapest to lose."""
        given: dict[Role, int | None] = {"prefill": prefill, "decode": decode}
        started, surplus = self._plan({role: count for role, count in given.items() if count is not None})
        self._changed()
        await asyncio.gather(*(self._end(worker, timeout_s) for worker in surplus))
        drained = [worker.name for worker in surplus]
        return ScaleResponse(started=started, drained=drained, asked_for=bool(started))

    def want(self, roles: Collection[Role]) -> None:
        """Requests wait for workers of these roles: a pool of none gets one."""
        for role in roles:
            if not self._of(role):
                log.warning("requests wait for a worker of a pool of none", extra={"fields": {"role": role}})
                self._plan({role: 1})
                self._changed()

    async def end_existing(self, timeout_s: float, step: ProgressStep = no_progress) -> list[str]:
        """Without `adopt`: drains and ends all workers that Ray has of this cluster, for good; their names."""
        names = await self._launcher.existing()
        await asyncio.gather(*(self._end_found(name, timeout_s, step) for name in names))
        await self._launcher.save(Desired())
        await self._launcher.request({})
        return names

    async def _end_found(self, name: str, timeout_s: float, step: ProgressStep) -> None:
        with contextlib.suppress(NotFound):
            worker = KeptWorker(name, _role_of(name), running=await self._launcher.find(name))
            waits = await self._launcher.waits_for(worker.running, worker.role)

            async def draining() -> str:
                return f"its requests end, for at most {timeout_s:g} s"

            with step(f"end {name}") as tell:
                if not waits:
                    await with_activity(self._drain(worker, timeout_s), draining, tell)
                await self._forget(worker)

    def _of(self, role: Role) -> list[KeptWorker]:
        return [worker for worker in self._workers if worker.role == role and not worker.ending]

    def _plan(self, counts: Mapping[Role, int]) -> tuple[list[str], list[KeptWorker]]:
        """Adds the workers that are missing; returns their names, and those too many, marked as ending."""
        started, surplus = list[str](), list[KeptWorker]()
        for role, count in counts.items():
            have = self._of(role)
            names = {worker.name for worker in self._workers}
            fresh = (name for number in itertools.count() if (name := f"{role}-{number}") not in names)
            for name in list(itertools.islice(fresh, max(0, count - len(have)))):
                self._add(role, name, "")
                started.append(name)
            surplus += self._cheapest(have)[: max(0, len(have) - count)]
        for worker in surplus:
            worker.ending = True
        return started, surplus

    def _cheapest(self, workers: list[KeptWorker]) -> list[KeptWorker]:
        """The cheapest to lose first: those not there, then by running requests, by pages held, and the newest."""
        reports = {report.address: report for report in self._fleet.statuses()}

        def cost(item: tuple[int, KeptWorker]) -> tuple[bool, int, int, int]:
            number, worker = item
            report = reports.get(worker.address, WorkerReport())
            requests = report.running_requests + report.waiting_requests
            return bool(worker.address), requests, report.pages.in_use + report.pages.cached, -number

        return [worker for _, worker in sorted(enumerate(workers), key=cost)]

    def _add(self, role: Role, name: str, address: str) -> KeptWorker:
        worker = KeptWorker(name, role, address=address)
        self._workers.append(worker)
        if address:
            self._fleet.add(address)
        worker.keeper = self._tasks.start("keep a worker", partial(self._keep, worker), about=name, vital=False)
        return worker

    async def _keep(self, worker: KeptWorker) -> None:
        """Has a worker run, until it is ended for good."""
        while True:
            drained = False
            try:
                await self._bring(worker)
                assert worker.running is not None
                if not (drained := await worker.running.wait_closed()):
                    async with asyncio.timeout(ANSWER_S):
                        await worker.running.address()
                    continue  # it was only out of reach
                why = "it was drained on its host, another one is asked for"
            except (IsthmusError, OSError) as error:
                why = str(error)
            if worker.ending:
                return
            log.warning("a worker is gone", extra={"fields": {"worker": worker.name, "why": why}})
            await self._forget(worker)
            if not drained:  # who orders that means this host: another one may have it at once
                worker.restarts.ended(time.monotonic())
            worker.doing = why
            self._changed()
            await asyncio.sleep(worker.restarts.next_s - time.monotonic())

    async def _bring(self, worker: KeptWorker) -> None:
        """Returns once a worker is there; raises why its start failed."""
        async with worker.launching:  # an actor that is asked for is there afterwards: it must not be forgotten
            if worker.ending:
                raise Unavailable("it is ended")
            running = worker.running or await self._launcher.launch(worker.role, worker.name)
            worker.running = running
        address = await with_activity(running.address(), partial(self._doing, worker), partial(self._tell, worker))
        with contextlib.suppress(IsthmusError, TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                worker.role = await running.role()
        worker.restarts.began(time.monotonic())
        worker.doing = ""
        if address != worker.address:
            before, worker.address = worker.address, address
            self._fleet.add(address)
            await self._leave(before)
            log.warning("a worker is there", extra={"fields": {"worker": worker.name, "address": address}})
        self._changed()

    async def _doing(self, worker: KeptWorker) -> str:
        assert worker.running is not None
        async with asyncio.timeout(ANSWER_S):
            waits = await self._launcher.waits_for(worker.running, worker.role)
            return waits or await worker.running.activity()

    def _tell(self, worker: KeptWorker, doing: str) -> None:
        if doing != worker.doing:
            worker.doing = doing
            self.tell()

    async def _forget(self, worker: KeptWorker) -> None:
        """Ends what is left of a worker, and lists its address no more: somebody else may have it next."""
        running, worker.running = worker.running, None
        address, worker.address = worker.address, ""
        await self._leave(address)
        if running is not None:
            with contextlib.suppress(IsthmusError, OSError):
                async with asyncio.timeout(GONE_S):
                    await running.stop()

    async def _leave(self, address: str) -> None:
        if address and not any(worker.address == address for worker in self._workers):
            await self._fleet.remove(address)

    async def _end(self, worker: KeptWorker, timeout_s: float) -> Drained:
        """Drains a worker, ends it and forgets it; one that is not there to be drained is ended all the same."""
        drained = await self._drain(worker, timeout_s) if worker.address else Drained(0, 0)
        async with worker.launching:
            await self._forget(worker)
        if worker.keeper is not None:
            await self._tasks.end(worker.keeper)
        self._workers.remove(worker)
        self._changed()
        return drained

    async def _end_by_itself(self, worker: KeptWorker) -> None:
        await self._end(worker, DRAIN_S)

    async def _drain(self, worker: KeptWorker, timeout_s: float) -> Drained:
        try:
            if worker.running is not None:
                async with asyncio.timeout(timeout_s + GONE_S):  # wait_for can swallow a cancellation
                    return await worker.running.drain(timeout_s)
        except (IsthmusError, TimeoutError) as error:
            log.warning("a worker was not drained", extra={"fields": {"worker": worker.name, "why": str(error)}})
        return Drained(0, 0)

    def _at(self, address: str) -> KeptWorker:
        found = next((worker for worker in self._workers if worker.address == address and not worker.ending), None)
        if found is None:
            raise NotFound(f"no worker at {address} is kept here any more")
        return found

    def _changed(self) -> None:
        """Something is to be written down, and told to gateways."""
        self._unsaved.set()
        self.tell()

    def tell(self) -> None:
        """Has gateways get the list now."""
        self.change.set()
        self.change = asyncio.Event()

    def _desired(self) -> Desired:
        workers = {one.name: Wanted(one.role, one.address) for one in self._workers if not one.ending}
        return Desired(configured=self._configured, workers=workers)

    def _counts(self) -> dict[Role, int]:
        """Workers that need room: those too that are being drained."""
        return {role: sum(worker.role == role for worker in self._workers) for role in ROLES}

    async def _save(self) -> None:
        """Writes down what is wanted and asks for its room, at each change."""
        self._unsaved.set()
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            try:
                await self._launcher.save(self._desired())
                await self._launcher.request(self._counts())
            except IsthmusError as error:
                log.error("what shall run could not be written down", extra={"fields": {"why": str(error)}})
                self._unsaved.set()
                await asyncio.sleep(RETRY_S)


def _role_of(name: str) -> Role:
    """The one that a worker was started in: its name says so."""
    return "prefill" if name.startswith("prefill") else "decode"
