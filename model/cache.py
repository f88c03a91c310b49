"""The folder of converted models: `$ISTHMUS_CACHE/models` or `~/.cache/isthmus/models`.

A model stands in a folder `NAME-KEY`, where the key is of the source's content, with a note (`isthmus.json`) of what it
was made from. It is made in a folder beside it and renamed when complete: what is there under its name is whole.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from ..kernels.cache_folder import cache_folder

_NOTE = "isthmus.json"


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a folder of the cache was made from."""

    name: str
    source: str
    converter: str  # version of the conversion

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The note of a folder; None where there is none."""
        try:
            return cls(**json.loads((folder / _NOTE).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def cache_root() -> Path:
    """Where converted models are kept."""
    return cache_folder() / "models"


def cached_models() -> list[tuple[Note, Path]]:
    """The complete folders of the cache, by name."""
    found = [(note, path) for path in cache_root().glob("*") if path.is_dir() and (note := Note.read(path))]
    return sorted(found, key=lambda item: (item[0].name, str(item[1])))


def cached_or_made(folder: Path, note: Note, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(empty folder)` if it was not there; one process makes it, others wait for it."""
    if Note.read(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock"), f"waiting for {note.name}, which is being converted"):
        if Note.read(folder):
            return folder
        for left_over in folder.parent.glob(f".{folder.name}.*/"):  # of a process that was killed: ours is the lock
            shutil.rmtree(left_over, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            make(fresh)
            (fresh / _NOTE).write_text(json.dumps(asdict(note), indent=2))
            fresh.chmod(0o755)
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


@contextmanager
def _locked(path: Path, waiting: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
