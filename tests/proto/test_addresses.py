"""Which texts are addresses of workers."""

import pytest

from isthmus.proto.addresses import check_address
from isthmus.proto.errors import InvalidRequest


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:7001",
        "[::1]:7001",
        "[fe80::1]:65535",
        "worker-3.example.org:1",
        "localhost:50051",
        "my_host:80",
        "a.b.:7",
    ],
)
def test_addresses(address: str) -> None:
    assert check_address("prefill_addresses", address) == address


@pytest.mark.parametrize(
    "address",
    [
        *("", ":", "host", "host:", ":7001", "host:0", "host:65536", "host:٣", "host:7001x", "host:+7", "host:999999"),
        *("unix:/run/x.sock", "unix:///run/x.sock:1", "unix-abstract:name:1", "vsock:1:2", "unix:x:7001"),
        *("xds:///service", "xds:///service:7001", "dns:///host:7001", "dns://1.2.3.4/host:7001", "ipv4:1.2.3.4:5"),
        *("ipv6:[::1]:5", "passthrough:///h:1", "::1:7001", "[::1]", "[x]:7001", "[::1%25eth0", "http://host:80"),
        *("a b:7001", "host\0:7001", "host\n:7001", "-a:7001", "a-.b:7001", "a..b:7001", "é:7001", "x" * 300 + ":1"),
    ],
)
def test_everything_else_is_refused_by_name(address: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^prefill_addresses .* is no address; allowed: host:port or \[IPv6\]"):
        check_address("prefill_addresses", address)
