"""The files of a cluster's processes, replaced as a person or Kubernetes would."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.proto.security.certificates import KeyPair, issue, make_ca
from isthmus.proto.security.identity import Identity, Role

CLUSTER = "tested"
HOSTS = ("127.0.0.1", "localhost")


def certificate(
    ca: KeyPair, *roles: Role, cluster: str = CLUSTER, hosts: Sequence[str] = HOSTS, days: float = 1
) -> KeyPair:
    """A certificate for a process of these roles."""
    return issue(ca, [Identity(cluster, role, f"some-{role}") for role in roles], hosts, days)


@dataclass
class CertificateFiles:
    """A folder for each process, by its roles."""

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
