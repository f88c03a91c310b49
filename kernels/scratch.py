"""Memory that the PyTorch paths of packing use again and again.

A fresh tensor of a few hundred KB is memory that the system has to map and clear, and that no cache holds; both cost
more than the arithmetic on it. Nor are the views of it made anew: a view costs as much as a thousand numbers' sum.
Each thread has its own.
"""

import threading
from collections.abc import Callable, Hashable
from math import prod
from typing import TypeVar, cast

import torch
from torch import Tensor

_LOCAL = threading.local()
_MOST_SPACES = 64
Space = TypeVar("Space")


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor. All of the same name, type and thread share memory."""
    buffers = _kept("buffers")
    key, size = (name, dtype, device), prod(shape)
    flat = cast(Tensor | None, buffers.get(key))
    if flat is None or flat.numel() < size:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            flat = buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return flat[:size].view(shape)


def space(make: Callable[..., Space], *key: Hashable) -> Space:
    """make(*key), or what it made for this thread before: an object with scratch tensors and views of them."""
    spaces = _kept("spaces")
    found = spaces.get((make, key))
    if found is None:
        if len(spaces) >= _MOST_SPACES:
            spaces.clear()
        with torch.inference_mode(False):
            found = spaces[make, key] = make(*key)
    return cast(Space, found)


def _kept(name: str) -> dict[Hashable, object]:
    if not hasattr(_LOCAL, name):
        setattr(_LOCAL, name, {})
    return getattr(_LOCAL, name)
