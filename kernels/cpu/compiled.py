"""Functions compiled by Numba and kept on disk for as long as nothing in `kernels/` changes.

Numba itself looks at a function's own file only, and would run what it compiled with other files' functions as those
were before. So what is compiled of other sources, or for another CPU, lies in a folder of its own.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from filelock import FileLock
from numba import njit
from numba.core import config, event
from numba.core.caching import FunctionCache

from ..cache_folder import cache_folder

log = logging.getLogger(__name__)

_FORGOTTEN_S = 30 * 86_400.0  # a folder that nobody has used for so long is removed
_config: Any = config  # its attributes come from the environment


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: machine code that releases the interpreter's lock. `options` are those of `numba.njit`."""

    def compile_later(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True, **options)(function)
        folder = _folder()
        if folder is not None:
            dispatcher._cache = _SharedCache(function, folder)  # what `cache=True` does, but for the lock
        return dispatcher

    return compile_later


class _SharedCache(FunctionCache):
    """Several processes may write at once.

    Numba reads a function's index, adds its entry and a number for the code, and writes both. Without a lock one of two
    processes would lose its entry, or leave it pointing at the other's code, which may be for other types.
    """

    def __init__(self, function: Callable[..., Any], folder: Path) -> None:
        before, _config.CACHE_DIR = _config.CACHE_DIR, str(folder)  # looked at here, and by all
        try:
            super().__init__(function)
        finally:
            _config.CACHE_DIR = before
        self._lock = FileLock(folder / "lock")

    def save_overload(self, sig: Any, data: Any) -> None:
        with self._lock:
            super().save_overload(sig, data)


@cache
def _folder() -> Path | None:
    """Of these very sources and this CPU, in `$NUMBA_CACHE_DIR` or our own; None where nothing can be written."""
    base = Path(_config.CACHE_DIR) if _config.CACHE_DIR else cache_folder() / "compiled"
    folder = base / f"isthmus-{_key(sorted(Path(__file__).parents[1].rglob('*.py')))}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK) or folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to somebody else")  # it is run, so that it must be ours
        os.utime(folder)
        _forget_others(folder)
    except OSError as error:
        log.warning("kernels are compiled anew at every start: %s (set ISTHMUS_CACHE to a folder of yours)", error)
        return None
    return folder


def target_cpu() -> tuple[str, str]:
    """Name and features, as LLVM writes them, of the CPU that is compiled for: this one, or what
    `$NUMBA_CPU_NAME` and `$NUMBA_CPU_FEATURES` say."""
    name, features = _config.CPU_NAME, _config.CPU_FEATURES
    return (
        llvm.get_host_cpu_name() if name is None else name,
        llvm.get_host_cpu_features().flatten() if features is None else features,
    )


def _key(sources: Iterable[Path]) -> str:
    key = hashlib.sha256(" ".join(target_cpu()).encode())
    for path in sources:
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return key.hexdigest()[:16]


def _forget_others(used: Path) -> None:
    for other in used.parent.glob("isthmus-*"):
        if time.time() - other.stat().st_mtime > _FORGOTTEN_S:
            shutil.rmtree(other, ignore_errors=True)


class _Running(event.Listener):
    """Counts what Numba compiles now."""

    def __init__(self) -> None:
        self.count = 0

    def on_start(self, event: event.Event) -> None:
        self.count += 1

    def on_end(self, event: event.Event) -> None:
        self.count -= 1


_running = _Running()
event.register("numba:compile", _running)


def is_compiling() -> bool:
    """Whether Numba compiles something in this process now, which may take many seconds in the middle of a step.

    From any thread.
    """
    return _running.count > 0
