"""Where a process has its certificates from: files that others replace, or memory."""

import os
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import InvalidRequest
from .certificates import KeyPair
from .identity import Identity


@dataclass(frozen=True)
class Material:
    """What TLS needs, as PEM: the CAs that are trusted (several while one follows another), and the own certificate.

    A client that has none of its own has no `pair`.
    """

    ca: bytes
    pair: KeyPair | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a source without reading its certificate: what it is for, and that its parts go together."""

    identities: tuple[Identity, ...]


class Source(Protocol):
    """Where certificates come from. `known` is None where only the certificate itself tells."""

    known: Known | None

    def stamp(self) -> Hashable:
        """Changes when what `read` returns does. Cheap; OSError where there is nothing to read."""
        ...

    def read(self) -> Material:
        """InvalidRequest where it cannot be read."""
        ...


@dataclass(frozen=True)
class Files(Source):
    """Files that are replaced while they are used: by a person, cert-manager, or Kubernetes (a Secret's symlinks)."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    known: Known | None = None

    def stamp(self) -> Hashable:
        found = [os.stat(path) for path in (self.ca, self.certificate, self.key) if path is not None]
        return tuple((each.st_dev, each.st_ino, each.st_mtime_ns, each.st_size) for each in found)

    def read(self) -> Material:
        pair = None
        if self.certificate is not None and self.key is not None:
            pair = KeyPair(_read(self.certificate), _read(self.key))
        return Material(_read(self.ca), pair)


@dataclass(frozen=True)
class Memory(Source):
    """Certificates that somebody handed over."""

    material: Material = field(repr=False)
    known: Known | None = None

    def stamp(self) -> Hashable:
        return 0

    def read(self) -> Material:
        return self.material


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
