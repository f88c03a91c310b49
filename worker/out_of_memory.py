"""Whether an error says that there was no memory."""

import torch

from ..proto.errors import Exhausted

_SAID = ("can't allocate memory", "not enough memory", "out of memory")  # how allocators of torch put it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller piece of the same work might have found the memory that it needs."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def no_memory(error: Exception, what: str) -> Exhausted:
    """The end of one request where there was none; raises any other error."""
    if not is_out_of_memory(error):
        raise error
    return Exhausted(f"no memory here for this {what}")
