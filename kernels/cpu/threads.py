"""Compiled code on the threads that PyTorch may use."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

_WORK_PER_THREAD = 1 << 19  # numbers, or products of numbers, that outweigh waking a thread


def in_parts(run: Callable[[int, int], None], rows: int, work: int) -> None:
    """Calls run(first, end) for ranges that together are [0, rows), on several threads where `work`, of all rows
    together, is worth it.

    `run` must release the interpreter's lock.
    """
    parts = min(torch.get_num_threads(), rows, 1 + work // _WORK_PER_THREAD)
    if parts <= 1:
        run(0, rows)
        return
    bounds = [rows * part // parts for part in range(parts + 1)]
    list(_threads().map(run, bounds[:-1], bounds[1:]))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "compiled")
