"""Which fast paths this process takes: each is tried once on small data, and has a plain path beside it.

What a CPU can do is not concluded from its name or flags: libraries need other combinations of instructions than
one would think, and environment variables have them use fewer. So the operation itself is run, and compared with the
plain path. One that raises, or gives other numbers, is not taken; a line of the log says which and why.

`ISTHMUS_COMPILED=never` takes no fast path at all, to tell a kernel's fault from the model's.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SETTING = "ISTHMUS_COMPILED"
_VALUES = ("auto", "never")


class WrongSetting(ValueError):
    """The environment variable has a value that means nothing."""


@cache
def compiles_allowed() -> bool:
    """Whether fast paths may be taken, by `$ISTHMUS_COMPILED`; WrongSetting where that is neither auto nor never."""
    return is_allowed(SETTING)


def is_allowed(setting: str) -> bool:
    """Whether an environment variable allows what it is about: auto does, never does not; else WrongSetting."""
    value = os.environ.get(setting) or "auto"
    if value not in _VALUES:
        raise WrongSetting(f"{setting} is {value!r}; allowed: {', '.join(_VALUES)}")
    return value == "auto"


@dataclass(frozen=True)
class FastPath:
    """One fast path; calling it says whether it is taken. The first call tries it."""

    name: str
    attempt: Callable[[], bool]  # runs the operation on small data: whether its numbers are right

    def __call__(self) -> bool:
        taken = _found.get(self.name)
        return self._try() if taken is None else taken

    def _try(self) -> bool:
        with _trying:
            if self.name not in _found:
                _found[self.name] = compiles_allowed() and works(self.name, self.attempt)
        return _found[self.name]


_found: dict[str, bool] = {}  # by name; tests forget it
_trying = threading.RLock()  # an attempt may ask for another path


def fast_path(name: str) -> Callable[[Callable[[], bool]], FastPath]:
    """A decorator: makes the attempt of an operation the question whether to take it."""
    return lambda attempt: FastPath(name, attempt)


def works(name: str, attempt: Callable[[], bool]) -> bool:
    """Whether the attempt succeeds; where it raises or finds other numbers, a line of the log says so."""
    try:
        if attempt():
            return True
        reason = "gives other numbers than the plain path"
    except Exception as error:  # of compilers and libraries, of any kind
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    log.warning("%s: not used on this machine, the plain path is: %s", name, reason)
    return False


def alike(fast: Tensor, plain: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two results are the same within rounding, as a part of the greatest number."""
    if fast.shape != plain.shape or fast.dtype != plain.dtype:
        return False
    fast, plain = fast.double(), plain.double()
    return bool((fast - plain).abs().max() <= tolerance * plain.abs().max())


def spread(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Different numbers within ±1, the same each time, for attempts."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * 1.7).view(shape).to(dtype)
