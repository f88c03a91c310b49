"""Memory that the PyTorch paths of packing use again and again.

A fresh tensor of a few hundred KB is memory that the system has to map and clear, and that no cache holds; both cost
more than the arithmetic on it. Each thread has its own.
"""

import threading
from math import prod

import torch
from torch import Tensor

_LOCAL = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, valid until this thread asks for the same name again."""
    buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] | None = getattr(_LOCAL, "buffers", None)
    if buffers is None:
        buffers = _LOCAL.buffers = {}
    key, size = (name, dtype, device), prod(shape)
    flat = buffers.get(key)
    if flat is None or flat.numel() < size:
        flat = buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return flat[:size].view(shape)
