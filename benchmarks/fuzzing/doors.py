"""How the fuzzer gets in: with certificates of the cluster for every role, with wrong ones, or in plain text."""

import ssl
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.certificates import KeyPair, issue, own_hosts
from isthmus.proto.security.credentials import Security
from isthmus.proto.security.identity import ROLES, Identity, identity
from isthmus.proto.security.sources import Known, Material, Memory
from isthmus.proto.security.state import LOCAL, auto_source, state_folder

NAME = "fuzzer"


class Doors:
    """The CA of the local cluster, and what it signs for the fuzzer."""

    def __init__(self) -> None:
        auto_source(LOCAL, "admin")  # makes the CA where there is none
        folder = state_folder() / LOCAL
        self.ca = KeyPair((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())
        self.identities = tuple(identity(LOCAL, role, NAME) for role in ROLES)
        self.pair = issue(self.ca, self.identities, own_hosts())
        self.context = self.tls(self.pair)

    def transport(self, pair: KeyPair | None = None, identities: tuple[Identity, ...] | None = None) -> Transport:
        """One with that certificate; by default with the one that has every role."""
        known = Known(self.identities if identities is None else identities)
        return Transport(Security(Memory(Material(self.ca.certificate, pair or self.pair), known)))

    def tls(self, pair: KeyPair) -> ssl.SSLContext:
        """TLS for sockets, that believes any server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with tempfile.TemporaryDirectory() as folder:
            certificate, key = Path(folder) / "crt", Path(folder) / "key"
            certificate.write_bytes(pair.certificate)
            key.write_bytes(pair.key)
            context.load_cert_chain(certificate, key)
        return context


def forged(ca: KeyPair | None, uris: Sequence[str], *, days: float = 1.0, names: Sequence[str] = ("x",)) -> KeyPair:
    """A certificate with any names, signed by a CA; by itself where that is None."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    signer: ec.EllipticCurvePrivateKey = key
    if ca is not None:
        issuer = x509.load_pem_x509_certificate(ca.certificate).subject
        loaded = serialization.load_pem_private_key(ca.key, None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
    now = datetime.now(UTC)
    alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    alternatives += [x509.DNSName(name) for name in names]
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=2)).not_valid_after(now + timedelta(days=days))
    builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), False)
    certificate = builder.sign(signer, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, *form),
    )
