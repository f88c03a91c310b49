"""Addresses of workers on the wire: "host:port", and none of the other things that gRPC would resolve."""

import ipaddress
import re

from .errors import InvalidRequest, shown

_LONGEST_HOST = 253  # RFC 1035
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_PORT = re.compile(r"[0-9]{1,5}")


def check_address(what: str, address: str) -> str:
    """Returns an address of the form host:port or [IPv6]:port; InvalidRequest for `unix:`, `xds:` and anything else.

    gRPC takes `unix:/run/x`, `xds:///y` or `dns://server/z` as a target too: a caller could then point a worker at
    sockets of its own host.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and _PORT.fullmatch(port) and 1 <= int(port) <= 65_535 and _is_host(host)):
        raise InvalidRequest(f"{what} {shown(address)} is no address; allowed: host:port or [IPv6]:port")
    return address


def _is_host(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            return False
        return True
    return len(host) <= _LONGEST_HOST and _HOST.fullmatch(host) is not None
