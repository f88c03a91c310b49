"""Whose pages the store holds, and how a tenant's are erased."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .files import BEGUN
from .places import NAME_FILE, PLAIN, Places, PlainPlaces
from .sealed import KEY_FILE, SEALED, SealedPlaces


@dataclass(frozen=True, kw_only=True)
class TenantPages:
    """What is there of one tenant."""

    tenant: str | None  # None: sealed by another secret, or without its key
    folder: str
    sealed: bool
    pages: int
    nbytes: int
    used_s: float  # when one was last used, in seconds since 1970


def list_tenants(folder: Path, sealed: SealedPlaces | None) -> list[TenantPages]:
    """All tenants with pages in a store's folder; the names of sealed ones need the secret."""
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or not path.name.startswith((PLAIN, SEALED)):
            continue
        statuses = [file.stat() for file in path.glob("*/*") if not file.name.endswith(BEGUN)]
        is_sealed = path.name.startswith(SEALED)
        found.append(
            TenantPages(
                tenant=(sealed.tenant_of(path.name) if sealed else None) if is_sealed else _named(path),
                folder=path.name,
                sealed=is_sealed,
                pages=len(statuses),
                nbytes=sum(status.st_size for status in statuses),
                used_s=max((status.st_mtime for status in statuses), default=0.0),
            )
        )
    return found


def forget_tenant(folder: Path, tenant: str, sealed: SealedPlaces | None) -> int:
    """Erases a tenant's pages: its key first, then the files. Returns how many there were; OSError where it fails.

    Without the key file what is left on the disk of sealed pages cannot be read by anybody. A worker that runs drops
    the key with its next look at the store.
    """
    everywhere: list[Places] = [PlainPlaces(folder), *([sealed] if sealed else [])]
    pages = 0
    for path in (folder / places.folder_of(tenant) for places in everywhere):
        if not path.is_dir():
            continue
        with suppress(FileNotFoundError):
            (path / KEY_FILE).unlink()
            _sync(path)
        pages += sum(1 for file in path.glob("*/*") if not file.name.endswith(BEGUN))
        _remove(path)
    _sync(folder)
    return pages


def _remove(path: Path) -> None:
    """Also where a worker writes there meanwhile."""
    for left in range(4, -1, -1):
        try:
            return shutil.rmtree(path)
        except FileNotFoundError:
            return None
        except OSError:
            if not left:
                raise
    return None


def _named(path: Path) -> str | None:
    try:
        return (path / NAME_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
