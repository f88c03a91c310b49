"""Who may ask over HTTP: the same keys and tokens as over gRPC, and no page of another site in somebody's browser."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from ...proto.errors import PermissionDenied, shown
from ...proto.rpc.addresses import HostPort
from ...proto.security.authority import Authority
from ...proto.security.identity import identities_by_names
from ..access.caller import Caller, Refused, calling
from ..access.peers import network_of
from .door import Door

_METHOD = "/isthmus.v1.Generation/Generate"  # a certificate that may call this may ask over HTTP


async def authenticate(door: Door, scope: Scope, cluster: str) -> Caller:
    """Finds out who asks, for all that runs below; Refused where that is nobody who may, PermissionDenied where it is a
    page of another site, or the holder of a certificate that is for something else. `cluster`: of the gateway's own."""
    headers = Headers(scope=scope)
    _check_origin(door, scope, headers)
    _check_certificate(scope, cluster)
    try:
        caller = door.access.authenticate(_credentials(headers))
    except Refused as error:
        await door.refusals.note(error, peer_of(scope), f"{scope['method']} {scope['path']}"[:200])
        raise
    calling.set(caller)
    return caller


def peer_of(scope: Scope) -> str:
    """The address that a request came from, as `access/peers.py` counts it."""
    client = scope.get("client")
    return (network_of(client[0]) if client else "") or "unknown"


def _credentials(headers: Headers) -> list[tuple[str, str]]:
    """As metadata of gRPC. A key may come as `x-api-key`, which Anthropic's clients send; two that differ are none."""
    shown_ones = headers.getlist("authorization")
    shown_ones += [f"Bearer {key}" for key in headers.getlist("x-api-key") if f"Bearer {key}" not in shown_ones]
    return [("authorization", value) for value in shown_ones]


def _check_origin(door: Door, scope: Scope, headers: Headers) -> None:
    """A browser sends what any page tells it to, to loopback addresses too, and by a name that the page has chosen."""
    host = headers.get("host", "")
    if door.access.mode == "loopback" and not _is_own_name(host):
        raise PermissionDenied(f"host {shown(host)}; allowed without API keys: localhost, or a loopback address")
    origin = headers.get("origin")
    allowed = door.config.cors_origins
    if origin is None or "*" in allowed or origin in allowed or origin == f"{scope['scheme']}://{host}":
        return
    raise PermissionDenied(f"origin {shown(origin)}; allowed: those of gateway: {{http: {{cors_origins: [...]}}}}")


def _is_own_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and HostPort(name, 0).is_loopback


def _check_certificate(scope: Scope, cluster: str) -> None:
    """Of a port that asks for certificates: none of a worker's lets its holder ask as a client."""
    certificate: Mapping[str, Any] | None = scope["state"]["connection"].certificate
    if certificate is None:
        return
    names: list[tuple[str, str]] = list(certificate.get("subjectAltName", ()))
    common = next((value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"), "")
    identities = identities_by_names(
        [name for kind, name in names if kind == "URI"], [name for kind, name in names if kind == "DNS"], common
    )
    Authority(cluster).check_identities(_METHOD, identities, peer_of(scope))
