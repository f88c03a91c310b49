"""Files and folders that their owner alone reads, whatever the umask is."""

import os
import stat
from pathlib import Path

from ...proto.errors import InvalidRequest

FILE_MODE, FOLDER_MODE = 0o600, 0o700
MIN_SECRET, MAX_SECRET = 32, 4096  # bytes
MAKE_SECRET = "(umask 077; head -c 32 /dev/urandom > store.key)"


def make_private(folder: Path) -> None:
    """Makes a folder of mode 0700, or takes the rights of others to one that is there.

    InvalidRequest where that cannot be done: it is another user's, say, or the mount point of a volume. Nothing where
    it cannot be made at all: whoever writes there says so.
    """
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return
    problem = ""
    if status.st_uid != os.geteuid():
        problem = f"it belongs to user {status.st_uid}"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        try:
            folder.chmod(FOLDER_MODE)
        except OSError as error:
            problem = f"its mode is {stat.S_IMODE(status.st_mode):04o} and cannot be changed: {error.strerror}"
    if problem:
        raise InvalidRequest(
            f"store_dir {folder} is open to others ({problem}); allowed: a folder of mode 0700 that is this user's, "
            f"such as a new one in it: {folder / 'pages'}"
        )


def make_folder(folder: Path) -> None:
    """A folder of mode 0700 in one that is there; OSError as `mkdir`."""
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)


def create(path: Path) -> int:
    """The descriptor of a new file of mode 0600; OSError as `open`, FileExistsError where there is one."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)


def read_secret(path: Path) -> bytes:
    """The bytes of a secret file. InvalidRequest where it cannot be read, others can read it, or it is too short.

    A file of root may be readable by this process's group: that is how Kubernetes mounts a Secret for other users.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(
            f"store_key_file {path} cannot be read: {error.strerror}; make one: {MAKE_SECRET}"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        mounted = status.st_uid == 0 != os.geteuid()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest(f"store_key_file {path} is no ordinary file; make one: {MAKE_SECRET}")
        if status.st_uid not in (0, os.geteuid()) or mode & (0o037 if mounted else 0o077):
            raise InvalidRequest(
                f"store_key_file {path} has mode {mode:04o} and is user {status.st_uid}'s; allowed: 0600 and this "
                f"user's: chmod 600 {path}"
            )
        secret = file.read(MAX_SECRET + 1)
    if not MIN_SECRET <= len(secret) <= MAX_SECRET:
        raise InvalidRequest(
            f"store_key_file {path} has {len(secret)} bytes; allowed: {MIN_SECRET} to {MAX_SECRET} random ones: "
            f"{MAKE_SECRET}"
        )
    return secret
