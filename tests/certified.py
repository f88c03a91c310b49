"""Certificates for tests: CAs, and `Security` of somebody, from memory or from files that are replaced."""

from support.certificates import CLUSTER, certificate

from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.certificates import KeyPair
from isthmus.proto.security.credentials import Security
from isthmus.proto.security.identity import Identity, Role
from isthmus.proto.security.sources import Known, Material, Memory


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
