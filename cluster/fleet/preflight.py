"""No worker gets a request before it has shown that it works: a canary (`canary.py`) with a worker of the other role.

A new worker (or one that was started anew, or flipped) is paired with one that is verified, or, where there is none,
with another new one: the first pair verifies each other. A failure is in the status, in one line, and is tried again;
the worker stays out until a canary succeeds.
"""

import asyncio
import logging
import time
from collections import Counter
from functools import partial

from ...proto.tasks import Tasks
from .canary import Canary, CanaryFailed, CheckedModel
from .canary_schedule import CanarySchedule
from .registry import Fleet
from .worker_table import Member

log = logging.getLogger(__name__)

PATIENCE = 2  # canaries without an answer before a worker is called unfit: a machine may be busy
PERIOD_S = 0.5  # between two looks for workers that are due, where nothing changes


class Preflight:
    """Verifies the workers of a fleet, as long as it runs; the fleet keeps the verdicts. Belongs to its event loop."""

    def __init__(self, fleet: Fleet, model: CheckedModel, failures: "Counter[str] | None" = None) -> None:
        """`failures`: see `Tasks`."""
        self._background = Tasks(failures)
        self._fleet = fleet
        self._canary = Canary(fleet, model)
        self._schedule = CanarySchedule()

    def start(self) -> None:
        """Begins; `stop` ends it."""
        self._background.start("preflight", self._run, vital=False)  # who is verified goes on without it

    async def stop(self) -> None:
        """Ends the canaries that run."""
        await self._background.stop()

    async def _run(self) -> None:
        running: dict[asyncio.Task[None], tuple[str, str]] = {}
        try:
            while True:
                await self._round(running)
        finally:
            for task in running:
                task.cancel()

    async def _round(self, running: dict[asyncio.Task[None], tuple[str, str]]) -> None:
        """Starts the canaries that are due, and waits for one that ends, or for a change of the workers."""
        change = self._fleet.change
        busy = {address for pair in running.values() for address in pair}
        for prefill, decode in self._schedule.due(*self._fleet.table.to_verify(), busy, time.monotonic()):
            task = self._background.once("canary", partial(self._check, prefill, decode))
            running[task] = (prefill.address, decode.address)
        waiting = asyncio.ensure_future(change.wait())
        try:
            await asyncio.wait({*running, waiting}, timeout=PERIOD_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        for task in [task for task in running if task.done()]:
            del running[task]

    async def _check(self, prefill: Member, decode: Member) -> None:
        """One canary; both workers are verified by it, or the new ones of the two get its failure as their reason."""
        try:
            await self._canary.check(prefill, decode)
        except Exception as error:
            self._record_failure(prefill, decode, error)
            return
        for worker in (prefill, decode):
            self._fleet.judge(worker, None)

    def _record_failure(self, prefill: Member, decode: Member, error: Exception) -> None:
        names = {"prefill": prefill.report.worker_id, "decode": decode.report.worker_id}
        bug = not isinstance(error, CanaryFailed | TimeoutError | KeyError)
        reason = str(error) if isinstance(error, CanaryFailed) else "no answer in time"
        if bug:
            self._background.note("canary", error, " ".join(names.values()))
            reason = f"a bug of the gateway ({type(error).__name__}); see its log"
        for worker, partner in ((prefill, decode), (decode, prefill)):
            answered = isinstance(error, CanaryFailed) and error.by in ("", worker.address)
            count = self._schedule.record_failure(worker, partner, time.monotonic())
            if count >= PATIENCE or answered or bug:
                self._fleet.judge(worker, f"its canary with {partner.report.worker_id} failed: {reason}")
        log.warning("a canary failed", extra={"fields": {**names, "why": reason}})
