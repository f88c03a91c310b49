"""host:port, read, written and found out in one place.

An IPv6 host stands in brackets, as in "[::1]:7001". Nothing else is an address: no scheme ("unix:/...", "xds:///..."),
no path, no host without a port.
"""

import logging
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

from ..errors import InvalidRequest, shown

log = logging.getLogger(__name__)

ANY = ("0.0.0.0", "::")  # hosts to listen on that stand for every interface; gRPC serves IPv4 and IPv6 on either
RESOLVE_S = 2.0  # for the addresses of this host's name, where no route leads outward
# Addresses for documentation (RFC 5737, RFC 3849): nobody has them; to connect a datagram socket sends nothing.
_OUTWARD = {socket.AF_INET: "203.0.113.1", socket.AF_INET6: "2001:db8::1"}
_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_PORT = re.compile(r"[0-9]{1,5}")


class HostPort(NamedTuple):
    """A host, an IPv6 address without its brackets, and a port. `str` is what `parse_address` reads."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_any(self) -> bool:
        """Whether to listen here is to listen on every interface; nobody else can dial it."""
        return self.host in ANY

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can dial it, as far as that shows."""
        with suppress(ValueError):
            return ip_address(self.host).is_loopback
        return self.host == "localhost"


def parse_address(text: str, *, to_dial: bool = False, what: str = "") -> HostPort:
    """InvalidRequest where `text` is not host:port; with `to_dial` the port must not be 0, where nobody listens.

    `what` goes before the text in the error.
    """
    host, colon, port = text.rpartition(":")
    hint = "host:port, an IPv6 host in brackets ([::1]:7001), 0.0.0.0 for every interface"
    if not colon or not _PORT.fullmatch(port) or int(port) > 65535 or (to_dial and not int(port)):
        raise InvalidRequest(f"{what}{shown(text)} is not {hint}")
    if host.startswith("[") and host.endswith("]"):
        with suppress(ValueError):
            return HostPort(str(IPv6Address(host[1:-1])), int(port))
        raise InvalidRequest(f"{what}{shown(text)}: what is in brackets is not an IPv6 address")
    if not _HOST_NAME.fullmatch(host):
        raise InvalidRequest(f"{what}{shown(text)} is not {hint}")
    return HostPort(host, int(port))


def checked_address(text: str, *, to_dial: bool = False, for_others: bool = False) -> str:
    """The same text, for a setting: ValueError where it is no address, or with `for_others` one that no other host can
    dial, whoever it is given to."""
    try:
        parsed = parse_address(text, to_dial=to_dial or for_others)
    except InvalidRequest as error:
        raise ValueError(str(error)) from None
    if for_others and _is_nobodys(parsed.host):
        raise ValueError(f"{shown(text)} cannot be dialled: name a host or an address that others reach this one at")
    return text


def _is_nobodys(host: str) -> bool:
    """Whether it is an address that stands for every interface or for many hosts, in any way that C libraries read."""
    with suppress(OSError, UnicodeError):
        host = socket.inet_ntoa(socket.inet_aton(host))  # "0", "0x0.0": 0.0.0.0
    with suppress(ValueError):
        address = ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255"
    return False


def grpc_target(address: str) -> str:
    """The name that gRPC dials for host:port: as a host's name also where that is a scheme's ("unix:1", "xds:2")."""
    return f"dns:///{address.replace('%', '%25')}"


def address_for_others(bound: HostPort) -> HostPort:
    """Where other hosts reach a server that is `bound` so: its own host, or for every interface the one outward.

    May take RESOLVE_S where no route leads outward.
    """
    if not bound.is_any:
        return bound
    families = (socket.AF_INET6, socket.AF_INET) if bound.host == "::" else (socket.AF_INET, socket.AF_INET6)
    return HostPort(outward_host(families), bound.port)


def is_own(host: str) -> bool:
    """Whether an address, a name is none, is one of this host, or of this network namespace."""
    with suppress(ValueError, OSError):
        family = socket.AF_INET if ip_address(host).version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
        return not ip_address(host).is_unspecified
    return False


def outward_host(families: Sequence[socket.AddressFamily]) -> str:
    """This host's address on the interface that routes outward, of the first family that has such a route.

    Where none has: an address of the host's own name, or the loopback one.
    """
    for family in families:
        if found := _routed(family):
            return found
    if found := next(_named(families), None):
        return found
    loopback = _LOOPBACK[families[0]]
    log.warning("no route leads outward: others are told %s; --advertise names another address", loopback)
    return loopback


def _routed(family: socket.AddressFamily) -> str | None:
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((_OUTWARD[family], 9))
        host = probe.getsockname()[0]
        return host if _is_usable(host) else None
    return None


def _named(families: Sequence[socket.AddressFamily]) -> Iterator[str]:
    """Addresses of this host's name. The resolver has no timeout of its own: a thread that hangs is left behind."""
    found: list[tuple[int, str]] = []

    def resolve() -> None:
        with suppress(OSError, UnicodeError):
            found.extend((info[0], str(info[4][0])) for info in socket.getaddrinfo(socket.gethostname(), None))

    resolver = threading.Thread(target=resolve, name="resolver", daemon=True)
    resolver.start()
    resolver.join(RESOLVE_S)
    for family in families:
        yield from (host for its_family, host in tuple(found) if its_family == family and _is_usable(host))


def _is_usable(host: str) -> bool:
    """Whether other hosts can dial it as it is: not loopback (Debian's 127.0.1.1), link-local or unspecified."""
    with suppress(ValueError):
        address = ip_address(host)
        return not (address.is_loopback or address.is_link_local or address.is_unspecified)
    return False
