"""Certificates: a certificate authority (CA) of a cluster, and what it signs. Keys are EC P-256, files PEM.

`cryptography` is imported by what needs it: a process that only reads files it trusts does not wait for it.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING

from ..errors import InvalidRequest
from .identity import SERVERS, Identity, identities_by_names, server_names

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA_DAYS, LEAF_DAYS = 3650.0, 365.0
WARN_DAYS = 14.0  # before its end a certificate is warned of
_SKEW = timedelta(minutes=5)  # that the clocks of two hosts may differ by


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, as PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Certificate:
    """What a certificate says."""

    identities: tuple[Identity, ...]
    hosts: tuple[str, ...]  # other DNS names and addresses
    not_before: datetime
    not_after: datetime
    is_ca: bool
    subject: str
    issuer: str

    def days_left(self, now: datetime | None = None) -> float:
        """Until it ends; negative where it has ended."""
        return (self.not_after - (now or datetime.now(UTC))) / timedelta(days=1)


def make_ca(cluster: str, days: float = CA_DAYS) -> KeyPair:
    """A new CA, which may sign certificates of processes and no further CA."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    # A part that is drawn: two CAs of a cluster, of which one follows the other, are told apart by name.
    name = _name(f"isthmus {cluster} CA {secrets.token_hex(4)}")
    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = _builder(name, name, key, days).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    builder = builder.add_extension(_usage(signs_certificates=True), True).add_extension(key_id, False)
    return _signed(builder, key, key)


def issue(ca: KeyPair, identities: Sequence[Identity], hosts: Iterable[str] = (), days: float = LEAF_DAYS) -> KeyPair:
    """A certificate for a process with these identities, that others may also dial by `hosts` (names, addresses).

    InvalidRequest where `ca` is no CA with its key, or a host is none.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    issuer, signer = _loaded(ca)
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or not _is_ca(issuer):
        raise InvalidRequest("the certificate to sign with is not a CA, or its key is not an EC key")
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(each)) for each in identities]
    names += [x509.DNSName(name) for name in server_names(identities)]
    names += [_host(host) for host in dict.fromkeys(hosts)]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if any(each.role in SERVERS for each in identities):
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    first = identities[0]
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = _builder(_name(f"{first.role} {first.name}"[:64]), issuer.subject, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(signs_certificates=False), True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), False).add_extension(issuer_id, False)
    return _signed(builder, key, signer)


def describe(pem: bytes) -> list[Certificate]:
    """What the certificates of a file say, in its order; InvalidRequest where there are none."""
    return [_described(certificate) for certificate in _certificates(pem)]


def check(ca: bytes, pair: KeyPair | None) -> Certificate | None:
    """What the first certificate of a pair says. InvalidRequest where the files do not go together, as they do not for
    a moment while they are replaced one after the other: the key is of another certificate, or no CA signed it."""
    authorities = _certificates(ca)
    if pair is None:
        return None
    certificate, key = _loaded(pair)
    if _spki(key.public_key()) != _spki(certificate.public_key()):
        raise InvalidRequest("the private key is not that of the certificate")
    if not any(_is_signed_by(certificate, authority) for authority in authorities):
        raise InvalidRequest("the certificate is signed by none of the CAs")
    return _described(certificate)


def own_hosts() -> list[str]:
    """Names and addresses by which processes of this host reach it."""
    return [*with_host_names([socket.gethostname()]), "localhost", "127.0.0.1", "::1"]


def with_host_names(hosts: Iterable[str]) -> list[str]:
    """Those of them that a certificate can have: a host may be called what is no name of DNS."""
    found = list[str]()
    for host in hosts:
        with suppress(InvalidRequest):
            _host(host)
            found.append(host)
    return found


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    end = now + timedelta(days=days)
    return builder.not_valid_before(min(now, end) - _SKEW).not_valid_after(end)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> KeyPair:
    from cryptography.hazmat.primitives import hashes, serialization

    certificate = builder.sign(signer, hashes.SHA256())
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return KeyPair(certificate.public_bytes(encoding), key.private_bytes(encoding, form, serialization.NoEncryption()))


def _host(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    parts = host.lstrip("*.").split(".")
    if not host.isascii() or len(host) > 253 or not all(part.replace("-", "").isalnum() for part in parts):
        raise InvalidRequest(f"{host!r} is no host name and no address")
    return x509.DNSName(host)


def _certificates(pem: bytes) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InvalidRequest("not a certificate in PEM form") from None


def _loaded(pair: KeyPair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The certificate and its key; of a key that is not of an elliptic curve too."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    certificate = _certificates(pair.certificate)[0]
    try:
        return certificate, serialization.load_pem_private_key(pair.key, None)  # pyright: ignore[reportReturnType]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidRequest("not a private key in PEM form, without a password") from None


def _spki(key: object) -> bytes:
    from cryptography.hazmat.primitives import serialization

    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(encoding, form)  # pyright: ignore[reportAttributeAccessIssue]


def _is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _is_ca(certificate: x509.Certificate) -> bool:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _described(certificate: x509.Certificate) -> Certificate:
    from cryptography import x509

    try:
        names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        names = []
    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    identities = identities_by_names(
        [str(name.value) for name in names if isinstance(name, x509.UniformResourceIdentifier)],
        [name.value for name in names if isinstance(name, x509.DNSName)],
        str(common[0].value) if common else "",
    )
    hosts = [str(name.value) for name in names if str(name.value) not in map(str, identities)]
    internal = set(server_names(identities))
    return Certificate(
        identities=tuple(identities),
        hosts=tuple(host for host in hosts if host not in internal),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        is_ca=_is_ca(certificate),
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
    )
