"""Files of the page store: written whole, bounded in size together, the ones unused for longest removed first.

A page's file lies two folders below the store's (`TENANT/ab/NAME`); others are left alone, but for those of before
there were tenants (`ab/NAME`), which age. All are their owner's alone.

Several processes may share the folder. A file is used last when it was touched last (its modification time); who finds
the folder too full removes the oldest files, one process at a time.
"""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .private import create, make_folder, make_private

_EVICT_TO = 0.9  # of the limit, so that not every write has to look
_RECOUNT_S = 60.0  # what other processes write is noticed so late
_ABANDONED_S = 600.0  # a file that was begun so long ago was left by a process that is gone
BEGUN = ".begun"
_SHARD = 2  # digits in the name of a folder of pages


@dataclass(frozen=True)
class _Entry:
    path: str
    size: int
    used_s: float


class StoreFiles:
    """Methods that write are for one thread; `read`, `touch` and `remove` for any."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._names = itertools.count()
        self._bytes = 0  # in the folder, as far as this process knows
        self._counted_s: float | None = None
        self.evicted = 0

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none; OSError where it cannot be read."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def touch(self, name: str) -> bool:
        """Counts a use; whether the file is there."""
        path = self._folder / name
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError:  # a folder that is read-only
            return path.exists()
        return True

    def remove(self, name: str) -> None:
        """Removes a file where that can be done."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Makes a file, or replaces one by its like; OSError where that cannot be done, and then nothing is left."""
        size = sum(map(len, parts))
        self._make_room(size)
        path = self._folder / name
        make_private(self._folder)
        for folder in reversed(Path(name).parents[:-1]):
            make_folder(self._folder / folder)
        begun = path.with_name(f"{os.getpid()}-{next(self._names)}{BEGUN}")
        try:
            with os.fdopen(create(begun), "wb", buffering=0) as file:
                for part in parts:
                    _write_all(file.fileno(), part)
            begun.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                begun.unlink()
            raise
        self._bytes += size

    def _make_room(self, size: int) -> None:
        now_s = time.monotonic()
        if self._counted_s is None or now_s - self._counted_s > _RECOUNT_S or self._bytes + size > self._limit:
            make_private(self._folder)
            entries = list(self._entries())
            self._bytes, self._counted_s = sum(entry.size for entry in entries), now_s
            if self._bytes + size > self._limit:
                self._evict(entries, size)

    def _evict(self, entries: list[_Entry], size: int) -> None:
        try:
            with FileLock(self._folder / ".lock", timeout=0, mode=0o600):
                for entry in sorted(entries, key=lambda entry: entry.used_s):
                    if self._bytes + size <= self._limit * _EVICT_TO:
                        break
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)
                        self.evicted += 1
                    self._bytes -= entry.size
        except Timeout:
            return  # another process makes room

    def _entries(self) -> Iterator[_Entry]:
        """All pages in the folder; removes files that somebody began and will not end."""
        for folder, _, names in os.walk(self._folder):
            is_shard = len(os.path.basename(folder)) == _SHARD
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    if not name.endswith(BEGUN):
                        if is_shard:
                            yield _Entry(path, status.st_size, status.st_mtime)
                    elif time.time() - status.st_mtime > _ABANDONED_S:
                        os.unlink(path)

    def remove_others(self, beginning: str) -> int:
        """Removes every page that is not in a folder whose name begins so; returns how many. OSError where it fails."""
        with os.scandir(self._folder) as found:
            others = [entry.path for entry in found if entry.is_dir() and not entry.name.startswith(beginning)]
        pages = sum(len(names) for folder in others for _, _, names in os.walk(folder))
        for folder in others:
            shutil.rmtree(folder, ignore_errors=True)
        return pages


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
