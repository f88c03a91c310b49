"""Files of the page store: written whole, bounded in size together, the ones unused for longest removed first.

Several processes may share the folder. A file is used last when it was touched last (its modification time); who finds
the folder too full removes the oldest files, one process at a time.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

_EVICT_TO = 0.9  # of the limit, so that not every write has to look
_RECOUNT_S = 60.0  # what other processes write is noticed so late
_ABANDONED_S = 600.0  # a file that was begun so long ago was left by a process that is gone
_BEGUN = ".begun"


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
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.with_name(f"{os.getpid()}-{next(self._names)}{_BEGUN}")
        try:
            with begun.open("wb", buffering=0) as file:
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
            self._folder.mkdir(parents=True, exist_ok=True)
            entries = list(self._entries())
            self._bytes, self._counted_s = sum(entry.size for entry in entries), now_s
            if self._bytes + size > self._limit:
                self._evict(entries, size)

    def _evict(self, entries: list[_Entry], size: int) -> None:
        try:
            with FileLock(self._folder / ".lock", timeout=0):
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
        with os.scandir(self._folder) as shards:
            folders = [shard.path for shard in shards if shard.is_dir()]
        for folder in folders:
            with os.scandir(folder) as files:
                for file in files:
                    with contextlib.suppress(FileNotFoundError):
                        status = file.stat()
                        if not file.name.endswith(_BEGUN):
                            yield _Entry(file.path, status.st_size, status.st_mtime)
                        elif time.time() - status.st_mtime > _ABANDONED_S:
                            os.unlink(file.path)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
