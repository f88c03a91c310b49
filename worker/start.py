"""Work of a worker that starts, done so that those that serve on the same machine feel little of it.

Importing PyTorch and transformers and loading a model takes seconds of a core. Where workers share a machine, those are
taken from the others at the worst moment: one worker is lost, its requests go on with the rest, and it starts again.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

NICENESS = 5  # a third of what a thread at 0 gets of a core that both want; all of it where nobody else does


async def gently(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Runs `work` in a thread of its own that comes last for the processor; what it returns or raises.

    The thread ends with it: no thread that serves is ever slowed (a process cannot take its own niceness back).
    """
    executor = ThreadPoolExecutor(1, "starting", initializer=_lower_priority)
    try:
        return await asyncio.wrap_future(executor.submit(work, *args, **kwargs))
    finally:
        executor.shutdown(wait=False)


def _lower_priority() -> None:
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.nice(0) + NICENESS))
