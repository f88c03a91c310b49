"""A worker in a thread of its own: what a Ray actor is made of, and what tests start in their process.

No Ray in here. The worker's own imports (torch, transformers) happen in that thread, after the process was
given its thread settings.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal

from ...model.phases import current_phase
from ...proto.errors import Unavailable
from ..fleet.report import Role
from .local_orders import LocalOrders
from .role_host import RoleHost, settings_by_role

End = Literal["drained", "ended"]  # by an order on its host, for good; of anything else

TOLD_S = 0.2  # for whoever waits for its end to hear of it, before its process ends
FAILED = 70  # exit code of a worker whose engine failed (EX_SOFTWARE)
KEPT_PRODUCTS = 128  # products of matrices that PyTorch keeps the code of, by their shapes


def thread_settings(threads: int) -> dict[str, str]:
    """Environment of a worker process, to be set before torch is imported there.

    Passive waiting: threads that spin for work were measured to slow a busy two-core machine 30 times.

    oneDNN makes code for each number of rows that a layer is given, and two caches (its own, and PyTorch's above it)
    keep 1024 of them each: 0.2 to 0.5 MB for one, and a worker grew by hundreds of MB as prompts of new lengths came.
    To make one again takes a millisecond.
    """
    count, kept = str(threads), str(KEPT_PRODUCTS)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OMP_WAIT_POLICY": "PASSIVE",
        "LRU_CACHE_CAPACITY": kept,
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": kept,
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_for_one() -> int:
    """Threads of a worker that is started by hand and told nothing: half of the cores. There is at least one of each
    role, often on one host; what is taken does not depend on which of them starts first."""
    return max(1, usable_cores() // 2)


def end_process() -> None:
    """Ends this process: a worker whose engine failed serves nothing, and its supervisor starts another."""
    logging.shutdown()
    os._exit(FAILED)


_ACTIVITY_OF = {
    "imports": "importing PyTorch and transformers",
    "load": "reading weights",
    "speed_up": "packing weights",
    "probe": "trying the model's layers",
    "balance": "reading the calibration",
}


def activity() -> str:
    """What the start of a worker in this process is doing, in a few words; "" where there is nothing to tell."""
    phase = current_phase()
    if phase in ("", "imports"):
        return _ACTIVITY_OF.get(phase, "")
    from ...kernels.cpu.compiled import is_compiling  # imported by the worker
    from ...kvtransfer.calibration.progress import calibrated_share

    share = calibrated_share()
    if share is not None:
        return f"calibrating the tq- codecs for this model, once: {share:.0%}"
    return "compiling kernels for this CPU, once" if is_compiling() else _ACTIVITY_OF[phase]


class WorkerThread:
    """Runs one worker from its construction to `stop`. Methods block and may be called from any thread."""

    end_process: Callable[[], None] | None = None  # what follows a failure of its engine
    orders_from_host = False  # whether it listens on a socket of its host

    def __init__(self, role: Role, settings: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> None:
        """`other`: settings for the other role, should it flip; default: those of `settings` that both know."""
        by_role = settings_by_role(role, settings, other)
        self._address: Future[str] = Future()
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._host = RoleHost(role, by_role, self.end_process)
        self._local = LocalOrders(self._host) if self.orders_from_host else None
        self._thread = threading.Thread(target=self._run, name=f"{role} worker", daemon=True)
        self._thread.start()

    def address(self) -> str:
        """host:port, once the worker serves. Raises what its start raised; Unavailable once it has ended."""
        address = self._address.result()
        if self._closed.is_set():
            raise Unavailable("the worker has ended")
        return address

    def activity(self) -> str:
        """What its start is doing, in a few words; "" where there is nothing to tell."""
        return activity()

    def role(self) -> Role:
        """The one that it has now."""
        return self._host.role

    def drain(self, timeout_s: float) -> tuple[int, int]:
        """Takes no new work and waits for what runs, at most so long: how many ended, and were handed over."""
        if not self._address.done() or self._address.exception():
            return 0, 0
        drained = asyncio.run_coroutine_threadsafe(self._host.drain(timeout_s), self._loop).result()
        return drained.finished, drained.handed_over

    def stop(self) -> None:
        """Ends the worker at once; returns when it is gone."""
        if not self._closed.is_set() and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def wait_closed(self, timeout_s: float | None = None) -> End | None:
        """Returns when the worker has ended, or after `timeout_s`; how it has, None where it has not."""
        if not self._closed.wait(timeout_s):
            return None
        return "drained" if self._host.drained.is_set() else "ended"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(_start(self._host, self._local))
        except BaseException as error:  # handed to whoever asks for the address
            self._address.set_exception(error)
            self._closed.set()
            self._leave()
            return
        self._address.set_result(self._host.address)
        left = self._loop.create_task(_stop_once_left(self._host, self._loop))
        try:
            self._loop.run_forever()
            left.cancel()
            self._loop.run_until_complete(self._host.stop())
            if self._local is not None:
                self._loop.run_until_complete(self._local.stop())
        finally:
            self._closed.set()  # whatever failed: who follows this worker would wait for ever
        self._leave()

    def _leave(self) -> None:
        """Ends the process of a worker that was drained by order."""
        if self._host.drained.is_set() and self.end_process is not None:
            time.sleep(TOLD_S)
            self.end_process()


# No methods: a class with coroutines is to Ray an actor whose methods run in one event loop, and none may block that.


async def _start(host: RoleHost, local: LocalOrders | None) -> None:
    """Starts a worker; one that is drained by order before it serves ends here."""
    if local is not None:
        await local.start()
    starting, left = asyncio.ensure_future(host.start()), asyncio.ensure_future(host.drained.wait())
    await asyncio.wait({starting, left}, return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if not starting.done():
        raise Unavailable("the worker was drained before it served")
    starting.result()


async def _stop_once_left(host: RoleHost, loop: asyncio.AbstractEventLoop) -> None:
    """Ends a worker once it was drained by order: nothing is left to do here."""
    await host.drained.wait()
    loop.stop()
