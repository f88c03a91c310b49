"""Signs of life on a stream that a server writes to: proxies cut streams on which nothing comes for a minute."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from ..errors import IsthmusError
from ..tasks import Tasks

T = TypeVar("T")


@contextlib.asynccontextmanager
async def kept_alive(
    write: Callable[[T], Awaitable[None]], sign: Callable[[], T], every_s: float
) -> AsyncIterator[Callable[[T], Awaitable[None]]]:
    """What to write with instead of `write`: where nothing is written for `every_s`, `sign` makes what is.

    Ends the block with the IsthmusError of a sign that could not be written.
    """
    tasks, one_at_once, last_s = Tasks(), asyncio.Lock(), time.monotonic()
    stalled: list[IsthmusError] = []
    handler = asyncio.current_task()
    assert handler is not None

    async def pass_on(message: T) -> None:
        nonlocal last_s
        async with one_at_once:  # gRPC takes one message of a stream at a time
            await write(message)
        last_s = time.monotonic()

    async def signs() -> None:
        while True:
            left_s = last_s + every_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                message = sign()
                try:
                    await pass_on(message)
                except IsthmusError as error:  # nobody reads
                    stalled.append(error)
                    handler.cancel()
                    return
                except Exception:  # the client is gone: gRPC ends the handler
                    return

    tasks.once("signs of life", signs)
    try:
        yield pass_on
    except asyncio.CancelledError:
        if not stalled:
            raise
        handler.uncancel()
        raise stalled[0] from None
    finally:
        await tasks.stop()
