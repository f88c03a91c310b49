"""Runs something in the foreground until SIGINT or SIGTERM: the first one ends it in order, a second one at
once."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

DONE, INTERRUPTED = 0, 130
GIVE_UP_S = 30.0  # after a signal while it starts
AT_ONCE_S = 5.0  # after a second signal


def run_service(
    start: Callable[[], Awaitable[None]],
    stop: Callable[[float], Awaitable[None]],
    drain_s: float,
    drained: asyncio.Event | None = None,
) -> int:
    """Starts, waits for a signal, stops with `drain_s` seconds for what still runs; the exit code.

    `stop` is called in every case, with 0 where there is no time: start failed, or a second signal came. `drained` ends
    it as a first signal does. The code is INTERRUPTED where a signal came before everything ran or while it was ending.
    Raises what `start` or `stop` raises.

    A thread that waits in a library (Ray looks ten minutes for a head) cannot be stopped and holds up the end of its
    process: so the process ends, with INTERRUPTED and whatever still hangs, GIVE_UP_S after a signal that came while it
    was starting, and AT_ONCE_S after a second one.
    """
    return asyncio.run(_run(start, stop, drain_s, drained))


async def _run(
    start: Callable[[], Awaitable[None]],
    stop: Callable[[float], Awaitable[None]],
    drain_s: float,
    drained: asyncio.Event | None,
) -> int:
    first, second = asyncio.Event(), asyncio.Event()

    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if first.is_set():
            second.set()
            loop.call_later(AT_ONCE_S, os._exit, INTERRUPTED)
        else:
            first.set()
            if not starting.done():
                loop.call_later(GIVE_UP_S, os._exit, INTERRUPTED)

    starting = asyncio.ensure_future(start())
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    if not await _before(starting, first):
        await stop(0)
        return INTERRUPTED
    if starting.exception() is not None:
        await stop(0)
        starting.result()
    ending = [asyncio.ensure_future(event.wait()) for event in (first, drained) if event is not None]
    await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
    for waiting in ending:
        waiting.cancel()
    first.set()
    stopping = asyncio.ensure_future(stop(drain_s))
    if not await _before(stopping, second):
        await stop(0)
        return INTERRUPTED
    stopping.result()
    return DONE


async def _before(work: "asyncio.Future[None]", event: asyncio.Event) -> bool:
    """Waits for both; whether the work was done first. If not, it is cancelled."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if work.done():
        return True
    work.cancel()
    await asyncio.wait({work})
    return False
