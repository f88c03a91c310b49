"""Names and addresses by which others reach a server on this host: what its certificate has to have."""

import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import ip_address

from .certificates import own_hosts, with_host_names

RESOLVE_S = 2.0  # for the full name of this host


def reachable_hosts(listening: Iterable[str]) -> tuple[str, ...]:
    """What to put into the certificate of a server that listens on these hosts (names, addresses, 0.0.0.0, ::).

    For a loopback address nothing but the usual; for every interface all addresses of this host. May take RESOLVE_S.
    """
    hosts = [host for host in listening if not _is_loopback(host)]
    found = own_hosts()
    if hosts:
        found += [*_full_name(), *(host for host in hosts if not _is_any(host))]
    if any(map(_is_any, hosts)):
        found += _addresses()
    return tuple(dict.fromkeys(with_host_names(found)))


def _addresses() -> list[str]:
    """Of all interfaces, but for those that are good on one link only."""
    import psutil

    every = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    found = list[str]()
    for text in every:
        with suppress(ValueError):  # the address of a network card
            address = ip_address(text)
            if not (address.is_link_local or address.is_loopback):
                found.append(text)
    return found


def _full_name() -> list[str]:
    """The resolver has no timeout of its own: a thread that hangs is left behind."""
    found = list[str]()

    def resolve() -> None:
        with suppress(OSError, UnicodeError):
            for info in socket.getaddrinfo(socket.gethostname(), None, flags=socket.AI_CANONNAME):
                found.append(info[3])

    resolver = threading.Thread(target=resolve, name="resolver", daemon=True)
    resolver.start()
    resolver.join(RESOLVE_S)
    return [name for name in tuple(found) if name and not _is_loopback(name)]


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _is_any(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_unspecified
    return False
