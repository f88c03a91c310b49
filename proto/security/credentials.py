"""The credentials of a process: read from their source, read again when it changes, for servers and channels.

A server asks at each handshake, a channel at each call; both see a change within CHECK_S. What is read is checked
before it is used: where files are replaced one after the other, the old ones go on until the new ones go together.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from typing import Any

import grpc

from ..errors import InvalidRequest
from .certificates import Certificate, check
from .identity import Identity, Role, ServerName, server_name
from .sources import Known, Material, Source

log = logging.getLogger(__name__)

CHECK_S = 1.0  # between two looks at the source


class Security:
    """How a process proves who it is, and whom it believes. Any thread may call any method."""

    def __init__(
        self,
        source: Source,
        *,
        client_certificates: bool = False,
        expects_host: bool = False,
    ) -> None:
        """Reads the source. `client_certificates`: whether a port for clients asks them for a certificate.
        `expects_host`: servers are known by the host that is dialled, never by their role.

        InvalidRequest where it cannot be read, or its parts do not go together.
        """
        self.client_certificates = client_certificates
        self.version = 0  # of what is used now; one more at each change
        self._source, self._expects_host = source, expects_host
        self._lock = threading.Lock()
        self._looked_s = time.monotonic()
        self._stamp: Hashable = _stamp(source)
        self._expires: float | None = None
        self._asking_expiry = False
        self._material, self.identities = self._read(source.known)

    @property
    def cluster(self) -> str:
        """That of the own certificate; "" for a client that has none."""
        return self.identities[0].cluster if self.identities else ""

    @property
    def roles(self) -> frozenset[Role]:
        """Those of the own certificate."""
        return frozenset(each.role for each in self.identities)

    def require(self, role: Role) -> None:
        """InvalidRequest where the own certificate does not have this role."""
        if role not in self.roles:
            have = ", ".join(sorted(self.roles)) or "nobody"
            raise InvalidRequest(
                f"the certificate is for {have}, not for {role}; `isthmus certs issue --role {role}` makes one"
            )

    def require_cluster(self, cluster: str) -> None:
        """InvalidRequest where the own certificate is of another cluster."""
        if cluster != self.cluster:
            raise InvalidRequest(f"the certificate is of cluster {self.cluster}, the settings say cluster_id {cluster}")

    def current(self) -> tuple[int, Material]:
        """The version and the certificates that are used now; looks for a change first."""
        with self._lock:
            now_s = time.monotonic()
            if now_s >= self._looked_s + CHECK_S:
                self._looked_s = now_s
                self._look()
            return self.version, self._material

    def server_credentials(self, *, require_client_certificate: bool) -> grpc.ServerCredentials:
        """Of a server; each of its handshakes uses the certificates and CAs of then."""
        used, material = self.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            version, material = self.current()
            if version == used:
                return None
            used = version
            return _configuration(material)

        fetcher: Any = fetch  # None is for no change; its type says otherwise
        return grpc.dynamic_ssl_server_credentials(_configuration(material), fetcher, require_client_certificate)

    def channel_credentials(self) -> tuple[int, grpc.ChannelCredentials]:
        """Of a channel, which keeps them for life, and the version that they are of."""
        version, material = self.current()
        pair = material.pair
        key, chain = (pair.key, pair.certificate) if pair is not None else (None, None)
        return version, grpc.ssl_channel_credentials(material.ca, key, chain)

    def expected_name(self, role: ServerName | None) -> str | None:
        """The DNS name that a server of this role must have; None: the host that is dialled."""
        if role is None or not self.cluster or self._expects_host:
            return None
        return server_name(role, self.cluster)

    def expires_unix_s(self, found: Callable[[float], None] | None = None) -> float | None:
        """When the own certificate ends; None where that is not known yet: it is read beside what else happens here.

        `found` is called, from another thread, once it is known.
        """
        with self._lock:
            expires, asking, material = self._expires, self._asking_expiry, self._material
            if expires is not None or material.pair is None or asking:
                return expires
            self._asking_expiry = True
        threading.Thread(target=self._find_expiry, args=(material, found), name="certificate", daemon=True).start()
        return None

    def _find_expiry(self, material: Material, found: Callable[[float], None] | None) -> None:
        certificate = None
        try:
            certificate = check(material.ca, material.pair)
        except InvalidRequest as error:  # checked before; a file that was handed over is believed
            log.warning("the own certificate cannot be used: %s", error)
        with self._lock:
            self._asking_expiry = False
            if certificate is not None and self._material is material:
                self._expires = certificate.not_after.timestamp()
        if certificate is not None and found is not None:
            found(certificate.not_after.timestamp())

    def _look(self) -> None:
        """Reads the source anew where it has changed; what cannot be used is left alone until it changes again."""
        try:
            stamp = _stamp(self._source)
            if stamp == self._stamp:
                return
            material, identities = self._read(None)
        except InvalidRequest as error:
            log.warning("new certificates cannot be used, the old ones go on: %s", error)
            return
        self._stamp = stamp
        if material == self._material:
            return
        if {each[:2] for each in identities} != {each[:2] for each in self.identities}:
            log.error("new certificates are for another role or cluster; the old ones go on")
            return
        self._material, self.identities, self.version = material, identities, self.version + 1
        log.info("new certificates are used from now on")

    def _read(self, known: Known | None) -> tuple[Material, tuple[Identity, ...]]:
        """What the source has, checked where nothing is known of it."""
        material = self._source.read()
        if known is not None:
            self._expires = None
            return material, known.identities
        certificate = check(material.ca, material.pair)
        self._expires = None if certificate is None else certificate.not_after.timestamp()
        return material, () if certificate is None else _usable(certificate)


def _usable(certificate: Certificate) -> tuple[Identity, ...]:
    """The identities of an own certificate; InvalidRequest where it can be nobody's here, now."""
    if not certificate.identities:
        raise InvalidRequest("the certificate has no name isthmus://CLUSTER/ROLE/NAME; see `isthmus certs issue`")
    if len({each.cluster for each in certificate.identities}) > 1:
        raise InvalidRequest("the certificate names several clusters; a process is in one")
    if certificate.not_after < datetime.now(UTC):
        raise InvalidRequest(f"the certificate has ended on {certificate.not_after:%Y-%m-%d}")
    return certificate.identities


def _stamp(source: Source) -> Hashable:
    try:
        return source.stamp()
    except OSError as error:
        raise InvalidRequest(f"{error.filename} cannot be read: {error.strerror}") from None


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    if material.pair is None:
        raise InvalidRequest("a server needs a certificate of its own")
    return grpc.ssl_server_certificate_configuration([(material.pair.key, material.pair.certificate)], material.ca)
