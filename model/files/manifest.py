"""A manifest says what the files of a model are: the sha256 and the size of each. JSON:

    {"version": 1, "model": "NAME", "files": {"config.json": {"sha256": "64 hex digits", "bytes": 661}, ...}}

Of a folder it covers all files, those in sub-folders too, but for hidden ones (`.git`, `.cache`), which nobody reads;
of a GGUF file that one. Every start hashes every byte: sizes, times and inodes of files can be put back by whoever can
write them, so that nothing is taken from an earlier start.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...proto.errors import InvalidRequest
from .bounded import MAX_JSON, read_json

VERSION = 1
END = ".manifest.json"
_CHUNK = 8 << 20  # bytes read at a time
_THREADS = 4
_TELL_S = 5.0  # between two lines of progress

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a file."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Verified:
    """What was compared."""

    files: int
    nbytes: int
    seconds: float


def beside(model: Path) -> Path:
    """Where the manifest of a folder or file is looked for, and written to, where none is named: `MODEL.manifest.json`.

    Not in the folder: whoever can change the files there could change it too.
    """
    model = model.resolve()
    return model.with_name(model.name + END)


def files_of(model: Path) -> dict[str, Path]:
    """The files that a manifest of a folder, or of a GGUF file, covers, by the names that it has for them."""
    if model.is_file():
        return {model.name: model}
    found: dict[str, Path] = {}
    for folder, below, names in os.walk(model):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(folder) / name
                found[path.relative_to(model).as_posix()] = path
        for name in below:
            if (link := Path(folder) / name).is_symlink():
                raise InvalidRequest(f"{link} is a link to a folder, which no manifest covers")
    return found


def write_manifest(model: Path, file: Path, name: str, tell: Tell | None = None) -> Verified:
    """Makes the manifest of what is there now."""
    began_s = time.monotonic()
    paths = files_of(model)
    digests = _hash_all(paths, tell)
    entries = {key: {"sha256": entry.sha256, "bytes": entry.nbytes} for key, entry in sorted(digests.items())}
    text = json.dumps({"version": VERSION, "model": name, "files": entries}, indent=2) + "\n"
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)
    return Verified(len(entries), sum(entry.nbytes for entry in digests.values()), time.monotonic() - began_s)


def read_manifest(file: Path) -> dict[str, Entry]:
    """What a manifest says; InvalidRequest where there is none, or it is not one."""
    try:
        found = read_json(file, 8 * MAX_JSON)
    except OSError as error:
        raise InvalidRequest(f"the manifest {file} cannot be read: {error.strerror}") from None
    if not isinstance(found, dict) or found.get("version") != VERSION or not isinstance(found.get("files"), dict):
        raise InvalidRequest(f"{file} is no manifest of version {VERSION}; `isthmus models verify --write` makes one")
    return {name: _entry(file, name, entry) for name, entry in found["files"].items()}


def _entry(file: Path, name: str, entry: Any) -> Entry:
    digest, nbytes = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest) or type(nbytes) is not int:
        raise InvalidRequest(f"{file} has no sha256 and bytes for {name[:200]!r}")
    return Entry(digest.lower(), nbytes)


def verify_model(model: Path, manifest: Path, tell: Tell | None = None) -> Verified:
    """Compares a folder or GGUF file with its manifest; InvalidRequest, naming up to three files, where it differs.

    Names and sizes are compared before anything is read.
    """
    began_s = time.monotonic()
    said, paths = read_manifest(manifest), files_of(model)
    problems = [f"{name} is missing" for name in sorted(said.keys() - paths.keys())]
    problems += [f"{name} is not in the manifest" for name in sorted(paths.keys() - said.keys())]
    sizes = {name: paths[name].stat().st_size for name in said.keys() & paths.keys()}
    for name, size in sorted(sizes.items()):
        if size != said[name].nbytes:
            problems.append(f"{name} has {size} bytes, not {said[name].nbytes}")
    if not problems:
        digests = _hash_all(paths, tell)
        problems = [f"{name} has another content" for name in sorted(said) if digests[name] != said[name]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InvalidRequest(
            f"{model} is not what {manifest} says: {', '.join(problems[:3])}{more}; nothing of it is loaded"
        )
    return Verified(len(said), sum(sizes.values()), time.monotonic() - began_s)


def _hash_all(paths: Mapping[str, Path], tell: Tell | None) -> dict[str, Entry]:
    progress = _Progress(sum(path.stat().st_size for path in paths.values()), tell)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        return dict(zip(paths, threads.map(lambda path: _hash(path, progress), paths.values()), strict=True))


def _hash(path: Path, progress: "_Progress") -> Entry:
    digest, nbytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            nbytes += len(chunk)
            progress.add(len(chunk))
    return Entry(digest.hexdigest(), nbytes)


class _Progress:
    """Tells every few seconds how far the hashing is."""

    def __init__(self, total: int, tell: Tell | None) -> None:
        self._total, self._tell, self._done = total, tell, 0
        self._told_s = time.monotonic()

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._tell and time.monotonic() - self._told_s > _TELL_S:
            self._told_s = time.monotonic()
            self._tell(f"hashed {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB of the model's files")


def tell_on_stderr(line: str) -> None:
    """Where a start tells what it is at."""
    print(line, file=sys.stderr, flush=True)
