"""What a handler writes its response stream with: a bound on callers that do not read, and heartbeats.

Proxies cut streams on which nothing comes for a minute; a heartbeat is a message without content that prevents it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc.aio

from ..errors import Expired, IsthmusError
from ..tasks import Tasks

T = TypeVar("T")

STALL_S = 60.0  # that a caller may take nothing of what is written to it
_LAST_WRITE_S = 2.0  # for a message that is under way when its handler is cancelled


class Stalled(Expired):
    """Whoever called reads nothing. It cannot be told: a status would wait behind what it does not read."""


async def write_in_time(context: grpc.aio.ServicerContext, message: Any) -> None:
    """Writes to a stream; Stalled where its reader takes nothing for STALL_S: what it holds is wanted by others.

    A cancellation waits a moment for the message: gRPC sends no status beside one, and the caller would hear nothing.
    """
    writing = asyncio.ensure_future(context.write(message))
    writing.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with asyncio.timeout(STALL_S):
            await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing], timeout=_LAST_WRITE_S)
        raise
    except TimeoutError:
        writing.cancel()
        raise Stalled(f"nothing was read from this stream for {STALL_S:g} s") from None


@contextlib.asynccontextmanager
async def with_heartbeat(
    write: Callable[[T], Awaitable[None]], heartbeat: Callable[[], T], every_s: float
) -> AsyncIterator[Callable[[T], Awaitable[None]]]:
    """What to write with instead of `write`: where nothing is written for `every_s`, the message of `heartbeat` is.

    Ends the block with the IsthmusError of a heartbeat that could not be written.
    """
    tasks, one_at_once, last_s = Tasks(), asyncio.Lock(), time.monotonic()
    failed: list[IsthmusError] = []
    handler = asyncio.current_task()
    assert handler is not None

    async def pass_on(message: T) -> None:
        nonlocal last_s
        async with one_at_once:  # gRPC takes one message of a stream at a time
            await write(message)
        last_s = time.monotonic()

    async def beat() -> None:
        while True:
            left_s = last_s + every_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                message = heartbeat()
                try:
                    await pass_on(message)
                except IsthmusError as error:  # nobody reads
                    failed.append(error)
                    handler.cancel()
                    return
                except Exception:  # the client is gone: gRPC ends the handler
                    return

    tasks.once("heartbeat", beat)
    try:
        yield pass_on
    except asyncio.CancelledError:
        if not failed:
            raise
        handler.uncancel()
        raise failed[0] from None
    finally:
        await tasks.stop()
