"""Digests of whole files, each read once: what was found is kept by the file's path, size and times.

A file of another size or time is read again. One that was changed and had both put back is taken for the old one only
where its change time was put back too, which no tool for files does; deleting the folder `digests` of the cache forgets
everything.
"""

import json
import mmap
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import xxhash

from ...kernels.cache_folder import cache_folder

_CHUNK = 16 << 20  # bytes hashed at a time
_SETTLED_NS = 2 * 10**9  # a file younger than this may change again within one tick of its file system's clock


def content_digest(path: Path) -> str:
    """32 hex digits (xxh3-128) over all bytes of a file; OSError where it cannot be read."""
    path = path.resolve()
    kept = cache_folder() / "digests" / f"{xxhash.xxh3_128_hexdigest(os.fsencode(path))}.json"
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        if (known := _read(kept, key)) is not None:
            return known
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
        digest = _hash(file.fileno(), status.st_size)
    if settled:
        _keep(kept, key, digest)
    return digest


def _hash(descriptor: int, size: int) -> str:
    digest = xxhash.xxh3_128()
    if size:  # an empty file has no map
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            content.madvise(mmap.MADV_SEQUENTIAL)
            for start in range(0, size, _CHUNK):
                digest.update(view[start : start + _CHUNK])
    return digest.hexdigest()


def _read(kept: Path, key: list[str | int]) -> str | None:
    try:
        found = json.loads(kept.read_bytes())
        return found["digest"] if found["file"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _keep(kept: Path, key: list[str | int], digest: str) -> None:
    with suppress(OSError):  # a cache that cannot be written costs time, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as fresh:
            json.dump({"file": key, "digest": digest}, fresh)
        os.replace(fresh.name, kept)
