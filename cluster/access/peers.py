"""Callers that fail again and again: the more often, the longer they wait for their answer. Pure: time is an argument.

What is slowed is failures alone: behind one address there may be many callers, and a right key is never kept waiting.
"""

import ipaddress
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote

FREE = 10  # failures in a row that cost nothing
PER_S = 1.0  # failures a second that cost nothing
LONGEST_S = 3.0  # that an answer waits
MAX_PEERS = 4_096  # that are remembered, those that failed last
MAX_HELD = 512  # answers that wait at once; more are sent without a wait


@dataclass
class PeerFailures:
    """The failures of addresses; belongs to one event loop."""

    held: int = 0  # answers that wait now
    _level: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)  # failures, as of when

    def __len__(self) -> int:
        return len(self._level)

    def failed(self, peer: str, now_s: float) -> float:
        """Counts a failure of an address; the seconds that its answer shall wait."""
        count, then_s = self._level.pop(peer, (0.0, now_s))
        count = min(max(0.0, count - (now_s - then_s) * PER_S) + 1.0, FREE + LONGEST_S * PER_S)
        self._level[peer] = (count, now_s)
        if len(self._level) > MAX_PEERS:
            self._level.popitem(last=False)
        wait_s = max(0.0, (count - FREE) / PER_S)
        return wait_s if self.held < MAX_HELD else 0.0

    def is_noisy(self, peer: str) -> bool:
        """Whether it fails more often than each time is worth a line of a log."""
        return self._level.get(peer, (0.0, 0.0))[0] > FREE


def address_of(peer: str) -> str:
    """The address in gRPC's name of a peer ("ipv4:10.0.0.7:41234", "ipv6:%5B::1%5D:41234"), without its port; of IPv6
    the network, since each host has 2^64 addresses to call from."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind
    return network_of(rest.rpartition(":")[0].strip("[]")) or kind


def network_of(host: str) -> str:
    """The same of an IP address; "" for what is none."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            mapped = address.ipv4_mapped
            return str(mapped) if mapped else str(ipaddress.ip_network((address, 64), strict=False).network_address)
        return str(address)
    return ""
