"""The file of API keys: JSON, written by `isthmus keys`, read by gateways. It holds no key, only what proves one."""

import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from ...proto.errors import InvalidRequest
from .keys import KeyRecord, KeyTable

MAX_BYTES = 64 << 20
LOCK_S = 10.0  # for another command that writes


class KeyDocument(BaseModel):
    """The whole file. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    keys: tuple[KeyRecord, ...] = ()


def parse(data: bytes) -> KeyDocument:
    """ValueError with what is wrong, and no more of the file than the name of a field."""
    try:
        document = KeyDocument.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"is not a file of API keys: {where + ': ' if where else ''}{first['msg']}") from None
    KeyTable(document.keys)
    return document


def parse_table(data: bytes) -> KeyTable:
    """The keys as a gateway looks them up. ValueError as `parse`, and where there is none: nobody would be let in."""
    if not data.strip():
        raise ValueError("is empty")
    document = parse(data)
    if not document.keys:
        raise ValueError("has no keys")
    return KeyTable(document.keys)


def read(path: Path) -> KeyDocument:
    """The file; none where it is not there. InvalidRequest where it is something else."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return KeyDocument()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    if not data.strip():
        return KeyDocument()
    try:
        return parse(data)
    except ValueError as error:
        raise InvalidRequest(f"{path} {error}") from None


def change(path: Path, edit: Callable[[KeyDocument], KeyDocument]) -> None:
    """Replaces the file by what `edit` makes of it, in one step, while no other command changes it. It is the owner's
    alone (0600); one that is there keeps its owner, and its group may read it where it could before.

    InvalidRequest where it cannot be read or written, and what `edit` raises.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{path}.lock", timeout=LOCK_S, mode=0o600):
            if path.exists() and path.stat().st_mode & stat.S_IWOTH:
                raise InvalidRequest(f"{path} may be written by everybody: see what is in it, then chmod 600")
            document = edit(read(path))
            text = json.dumps(document.model_dump(mode="json", exclude_defaults=True) | {"version": 1}, indent=1)
            _replace(path, text.encode() + b"\n")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror or error}") from None


def _replace(path: Path, data: bytes) -> None:
    handle, name = mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            with suppress(FileNotFoundError):
                before = path.stat()
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), 0o600 | (stat.S_IMODE(before.st_mode) & 0o040))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
