"""Certificates for tests: CAs, and `Security` of somebody, from memory or from files that are replaced."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.certificates import KeyPair, issue, make_ca
from isthmus.proto.security.credentials import Security
from isthmus.proto.security.identity import Identity, Role
from isthmus.proto.security.sources import Known, Material, Memory

CLUSTER = "tested"
HOSTS = ("127.0.0.1", "localhost")


def certificate(
    ca: KeyPair, *roles: Role, cluster: str = CLUSTER, hosts: Sequence[str] = HOSTS, days: float = 1
) -> KeyPair:
    """A certificate for a process of these roles."""
    return issue(ca, [Identity(cluster, role, f"some-{role}") for role in roles], hosts, days)


def security(ca: KeyPair, *roles: Role, cluster: str = CLUSTER, trusts: bytes | None = None) -> Security:
    """What such a process uses."""
    return Security(Memory(Material(trusts or ca.certificate, certificate(ca, *roles, cluster=cluster))))


def transport(ca: KeyPair, *roles: Role, cluster: str = CLUSTER, trusts: bytes | None = None) -> Transport:
    """What such a process dials and listens with."""
    return Transport(security(ca, *roles, cluster=cluster, trusts=trusts))


def believing(ca: bytes, pair: KeyPair | None, *roles: Role, cluster: str = CLUSTER) -> Security:
    """Of a process that looks at nothing it was given: expired certificates and the like."""
    identities = tuple(Identity(cluster, role, f"some-{role}") for role in roles)
    return Security(Memory(Material(ca, pair), Known(identities)))


@dataclass
class Folder:
    """The files of the processes of a cluster, replaced as a person or Kubernetes would."""

    path: Path
    ca: KeyPair = field(default_factory=lambda: make_ca(CLUSTER))

    def files(self, *roles: Role) -> dict[str, str]:
        """The setting `tls` of a process; its files are made."""
        folder = self.path / "-".join(roles)
        folder.mkdir(parents=True)
        self._write(folder, "ca", self.ca.certificate)
        self._issue(folder, roles)
        return {name: str(folder / name) for name in ("ca", "cert", "key")}

    def trust(self, *authorities: KeyPair) -> None:
        """Has all processes trust these CAs and no other."""
        for folder in self.path.iterdir():
            self._write(folder, "ca", b"".join(each.certificate for each in authorities))

    def issue_all(self, ca: KeyPair) -> None:
        """Gives all processes new certificates, of this CA."""
        self.ca = ca
        for folder in self.path.iterdir():
            self._issue(folder, tuple(folder.name.split("-")))  # pyright: ignore[reportArgumentType]

    def _issue(self, folder: Path, roles: tuple[Role, ...]) -> None:
        pair = certificate(self.ca, *roles)
        self._write(folder, "cert", pair.certificate)
        self._write(folder, "key", pair.key)

    def _write(self, folder: Path, name: str, content: bytes) -> None:
        beside = folder / f".{name}"
        beside.write_bytes(content)
        beside.rename(folder / name)
