"""`tls: auto`: the CA and certificates of the clusters of this user on this machine, in the user's state folder.

    ~/.local/state/isthmus/tls/          0700; $XDG_STATE_HOME where that is set
        CLUSTER/ca.crt, ca.key           0600; made by whoever comes first
        CLUSTER/ROLE.crt, ROLE.key       of all processes of this role; made anew when two thirds of its life are over
        ports/PORT                       who listens there: "CLUSTER ROLE", or that it is plain text

Processes of one user on one machine trust each other so, with no option. Nothing of it leaves the machine, but for the
certificates that `isthmus up` hands to its workers.
"""

import contextlib
import os
import socket
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ..errors import InvalidRequest
from .certificates import LEAF_DAYS, KeyPair, describe, issue, make_ca, own_hosts
from .hosts import reachable_hosts
from .identity import ROLES, WORKERS, Identity, Role, checked_cluster, identity
from .sources import Files, Known, Material

LOCAL: Final = "local"  # the cluster of settings that name none
_PLAIN = "plain text"
_RENEW_S = LEAF_DAYS * 86_400 * 2 / 3  # age from which on a certificate is made anew
_LOOK_S = 3600.0  # between two looks at that age
_LOCK_S = 30.0
_MAX_HOSTS = 200  # of a certificate

# Processes of these roles share a certificate, so that a worker may flip, and one process may do both.
_TOGETHER: dict[Role, tuple[str, tuple[Role, ...]]] = {
    "prefill": ("worker", ("prefill", "decode")),
    "decode": ("worker", ("prefill", "decode")),
    "gateway": ("gateway", ("gateway", "supervisor")),
    "supervisor": ("gateway", ("gateway", "supervisor")),
    "admin": ("admin", ("admin", "client")),
    "client": ("admin", ("admin", "client")),
}


class Listening(NamedTuple):
    """Who listens on a port of this machine, as it wrote down itself; no cluster: in plain text."""

    cluster: str
    role: Role


def user_state() -> Path:
    """What isthmus keeps for this user on this machine."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "isthmus"


def state_folder() -> Path:
    """The folder of all certificates."""
    return user_state() / "tls"


def auto_source(cluster: str, role: Role, listening: tuple[str, ...] = ()) -> "AutoFiles":
    """The certificate of processes of this role, made where there is none. InvalidRequest where that fails.

    `listening`: hosts that a server of it listens on, for which its certificate shall be good too.
    """
    folder = state_folder() / checked_cluster(cluster)
    name, roles = _TOGETHER[role]
    identities = tuple(identity(cluster, each, socket.gethostname() or "host") for each in roles)
    source = AutoFiles(
        *(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key"), Known(identities), _Looks(), listening
    )
    source.renew()
    return source


def ca_of(cluster: str) -> Path:
    """The certificate of the CA of a cluster, for clients on other hosts."""
    return state_folder() / checked_cluster(cluster) / "ca.crt"


def hand_over(cluster: str, name: str) -> tuple[Material, tuple[Identity, ...]]:
    """A certificate for one worker, of either role, which is kept nowhere here."""
    folder = state_folder() / checked_cluster(cluster)
    identities = tuple(identity(cluster, role, name) for role in sorted(WORKERS))
    with _locked(folder):
        ca = _ca(folder, cluster)
    return Material(ca.certificate, issue(ca, identities)), identities


@dataclass
class _Looks:
    last_s: float = -_LOOK_S


@dataclass(frozen=True)
class AutoFiles(Files):
    """Files of the state folder: made anew, by whoever notices first, before they end."""

    looks: _Looks = None  # pyright: ignore[reportAssignmentType]
    listening: tuple[str, ...] = ()

    def stamp(self) -> Hashable:
        self.renew()
        return super().stamp()

    def renew(self) -> None:
        """Makes the certificate where there is none, it is old, older than its CA, or not good for all hosts."""
        now_s = time.monotonic()
        if now_s < self.looks.last_s + _LOOK_S:
            return
        self.looks.last_s = now_s
        assert self.certificate is not None and self.key is not None and self.known is not None
        hosts = reachable_hosts(self.listening) if self.listening else ()
        if _is_fresh(self.ca, self.certificate, self.key) and not set(hosts) - _hosts(self.certificate, hosts):
            return
        folder, identities = self.ca.parent, self.known.identities
        with _locked(folder):
            ca = _ca(folder, identities[0].cluster)
            before = _hosts(self.certificate, hosts)  # of another process that shares it
            if not _is_fresh(self.ca, self.certificate, self.key) or set(hosts) - before:
                pair = issue(ca, identities, tuple(dict.fromkeys((*own_hosts(), *hosts, *before)))[:_MAX_HOSTS])
                _write(self.key, pair.key)
                _write(self.certificate, pair.certificate)


def note_port(port: int, cluster: str, role: Role) -> None:
    """Writes down who listens on a port, for clients of the same user: they are told no more than the address."""
    text = f"{cluster} {role}" if cluster else _PLAIN
    with contextlib.suppress(OSError, InvalidRequest):  # clients have to be told then
        folder = state_folder() / "ports"
        _make(folder)
        _write(folder / str(port), text.encode())


def forget_port(port: int) -> None:
    """Nobody listens there any more."""
    with contextlib.suppress(OSError):
        (state_folder() / "ports" / str(port)).unlink()


def who_listens(port: int) -> Listening | None:
    """Who listens on a port of this machine; None where nobody of this user has written it down."""
    try:
        text = (state_folder() / "ports" / str(port)).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    cluster, _, role = text.partition(" ")
    if text == _PLAIN:
        return Listening("", "gateway")
    known: Role | None = next((each for each in ROLES if each == role), None)
    return Listening(cluster, known) if known is not None else None


def _ca(folder: Path, cluster: str) -> KeyPair:
    """The CA of a folder that is locked; made where there is none."""
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if not (certificate.exists() and key.exists()):
        made = make_ca(cluster)
        _write(key, made.key)
        _write(certificate, made.certificate)
    return KeyPair(certificate.read_bytes(), key.read_bytes())


def _hosts(certificate: Path, wanted: tuple[str, ...]) -> set[str]:
    """For which a certificate is good; it is not looked into where none are wanted."""
    with contextlib.suppress(OSError, InvalidRequest):
        return set(describe(certificate.read_bytes())[0].hosts) if wanted else set()
    return set()


def _is_fresh(ca: Path, certificate: Path, key: Path) -> bool:
    try:
        made_s, ca_s = os.stat(certificate).st_mtime, os.stat(ca).st_mtime
        os.stat(key)
    except OSError:
        return False
    return made_s >= ca_s and time.time() - made_s + 300 >= 0 and time.time() - made_s < _RENEW_S


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        _make(folder)
        with FileLock(folder / "lock", timeout=_LOCK_S, mode=0o600):
            yield
    except Timeout:
        raise InvalidRequest(f"{folder} is locked for more than {_LOCK_S:g} s by another process") from None
    except OSError as error:
        raise InvalidRequest(
            f"certificates cannot be kept in {folder}: {error.strerror}; name a folder by XDG_STATE_HOME, "
            "certificates by tls: {ca, cert, key}, or set tls: off"
        ) from None


def _make(folder: Path) -> None:
    """Makes the folder; InvalidRequest where others than its owner may read or write in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in (folder, folder.parent):  # CLUSTER, and tls above it
        found = os.stat(each)
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            raise InvalidRequest(f"{each} belongs to another user; its certificates are not used")
        if found.st_mode & 0o077:
            os.chmod(each, 0o700)


def _write(path: Path, content: bytes) -> None:
    """Replaces a file at once, mode 0600."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(beside, path)
