"""TLS of the HTTP port, with the certificates of the gateway as they are at each handshake."""

import os
import ssl
from typing import Any

from ...proto.errors import InvalidRequest
from ...proto.rpc.addresses import parse_address
from ...proto.security.credentials import Security
from ...proto.security.sources import Material
from ..http_config import HttpTls


def security_for(tls: HttpTls, address: str, security: Security | None) -> Security | None:
    """What the HTTP port at an address is encrypted with; None: plain text. InvalidRequest where that would be plain
    text for others than this host and nobody has said that it may, or there are no certificates."""
    if tls == "off" or (tls == "auto" and parse_address(address).is_loopback):
        return None
    if security is not None:
        return security
    why = "gateway.http.tls is on" if tls == "on" else f"HTTP on {address} can be reached by others"
    raise InvalidRequest(
        f"{why}, and the cluster has no certificates (tls: off); allowed: certificates, HTTP on 127.0.0.1, none "
        "(gateway.http_listen: none, --no-http), or gateway: {http: {tls: off}} for plain text"
    )


def context_of(security: Security) -> ssl.SSLContext:
    """For a server; follows changes of the certificates."""
    used, material = security.current()
    newest = _context(material, security)

    def follow(tls: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        nonlocal used, newest
        version, material = security.current()
        if version != used:
            used, newest = version, _context(material, security)
        tls.context = newest

    serving = _context(material, security)
    callback: Any = follow  # its type says that the object is an SSLSocket
    serving.sni_callback = callback
    return serving


def _context(material: Material, security: Security) -> ssl.SSLContext:
    if material.pair is None:
        raise InvalidRequest("HTTP with TLS needs a certificate of the gateway")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    # ssl reads certificates from files only: from one in memory, so that no key is written to a disk.
    held = os.memfd_create("isthmus certificate", os.MFD_CLOEXEC)
    try:
        with open(held, "wb", closefd=False) as file:
            file.write(material.pair.certificate + b"\n" + material.pair.key)
        context.load_cert_chain(f"/proc/self/fd/{held}")
    finally:
        os.close(held)
    if security.client_certificates:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=material.ca.decode())
    return context
