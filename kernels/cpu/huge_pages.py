"""Memory for what is read in full at every step, in pages of 2 MB where the system has them.

Reading weights in pages of 4 KB spends a tenth of the time on finding the pages, more on a virtual machine.
"""

import contextlib
import math
import mmap
import threading

import torch
from torch import Tensor

_CHUNK = 64 << 20  # bytes asked of the system at once, so that small weights share a page
_ALIGNMENT = 64  # a line of the cache


class _Arena:
    """Hands out pieces of chunks, one after the other; a chunk is freed once nobody has a piece of it."""

    def __init__(self) -> None:
        self._chunk, self._used, self._lock = torch.empty(0, dtype=torch.uint8), 0, threading.Lock()

    def take(self, size: int) -> Tensor:
        with self._lock:
            if self._used + size > len(self._chunk):
                self._chunk, self._used = _mapped(max(size, _CHUNK)), 0
            piece = self._chunk[self._used : self._used + size]
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
            return piece


_arena = _Arena()


def zeros_in_huge_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, aligned to a line of the cache, that are meant to stay: what lies beside them stays too."""
    return _arena.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _mapped(size: int) -> Tensor:
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # Linux; where there are none, these are pages like any other
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)
