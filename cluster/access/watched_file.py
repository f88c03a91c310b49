"""A file that is read anew whenever it changes. What cannot be read is as good as empty: nobody is let in by it."""

import logging
import os
import stat
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
SETTLED_S = 2.0  # a file that was written so lately may change again without its times showing it


class WatchedFile(Generic[T]):
    """Its content as of the last `refresh`, or why there is none."""

    def __init__(self, path: str, parse: Callable[[bytes], T], most_bytes: int) -> None:
        """`parse` raises ValueError with what is wrong, as the end of a sentence that the path begins."""
        self.path = path
        self._parse, self._most_bytes = parse, most_bytes
        self._signature: tuple[int, ...] = ()
        self._now: tuple[T | None, str] = (None, f"{path} was not read yet")

    @property
    def content(self) -> T | None:
        """None where there is a problem."""
        return self._now[0]

    @property
    def problem(self) -> str:
        """Why there is no content; empty where there is."""
        return self._now[1]

    def refresh(self) -> None:
        """Reads the file if it may have changed. Blocks; never raises."""
        try:
            signature = self._look()
            if signature and signature == self._signature:
                return
            content: T | None = self._parse(self._read())
            problem, self._signature = "", signature
        except OSError as error:
            content, problem, self._signature = None, f"{self.path} cannot be read: {error.strerror or error}", ()
        except ValueError as error:
            content, problem, self._signature = None, f"{self.path} {error}", ()
        except Exception as error:  # whatever is wrong with it, nobody is let in by it
            content, problem, self._signature = None, f"{self.path} cannot be used: {type(error).__name__}", ()
        if problem != self.problem:
            if problem:
                log.error("a file of who may ask lets nobody in", extra={"fields": {"why": problem}})
            else:
                log.info("a file of who may ask is in use", extra={"fields": {"file": self.path}})
        self._now = (content, problem)

    def _look(self) -> tuple[int, ...]:
        """What tells that the file is the same as before; empty where nothing tells for sure."""
        found = os.stat(self.path)
        if found.st_mode & stat.S_IWOTH:
            raise ValueError("may be written by everybody: chmod 600")
        settled = max(found.st_mtime, found.st_ctime) < time.time() - SETTLED_S
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if settled else ()

    def _read(self) -> bytes:
        with open(self.path, "rb") as file:
            data = file.read(self._most_bytes + 1)
        if len(data) > self._most_bytes:
            raise ValueError(f"has more than {self._most_bytes} bytes")
        return data
