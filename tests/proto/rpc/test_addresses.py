"""host:port: what is one, and what a server tells others to dial."""

import re
import socket
import threading
import time
from typing import Any

import pytest

from isthmus.proto.errors import InvalidRequest
from isthmus.proto.rpc import addresses
from isthmus.proto.rpc.addresses import (
    HostPort,
    address_for_others,
    checked_address,
    grpc_target,
    outward_host,
    parse_address,
)
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.worker_pb2 import WORKER_ROLE_PREFILL
from isthmus.worker.server import WorkerServer

GOOD = {
    "127.0.0.1:0": ("127.0.0.1", 0),
    "worker-3.team_a.local:65535": ("worker-3.team_a.local", 65535),
    "[::1]:7001": ("::1", 7001),
    "[0:0:0:0:0:0:0:0]:7001": ("::", 7001),
    "[fe80::1%eth0]:1": ("fe80::1%eth0", 1),
    "unix:1": ("unix", 1),
}
BAD = (
    *("", "h", "h:", ":1", "h:-1", "h:65536", "h:1x", "h:²", "h:٣", "a b:1", "h:1 ", "h\n:1", "-h:1", "é:1"),
    *("::1:1", "[::1]", "[h]:1", "[127.0.0.1]:1", "[::1:1", "::1]:1", "unix:/tmp/s", "unix:///s:1", "xds:///h:1"),
    *("dns:///h:1", "ipv4:127.0.0.1:1", "http://h:1", "h:1/x", "u@h:1", "h:1,h:2", f"{'h' * 254}:1"),
)


@pytest.mark.parametrize("text", GOOD)
def test_what_is_read_is_what_is_written(text: str) -> None:
    read = parse_address(text)
    assert tuple(read) == GOOD[text]
    assert parse_address(str(read)) == read


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"host:port|not an IPv6 address"):
        parse_address(text)


def test_nobody_dials_port_0() -> None:
    assert parse_address("h:1", to_dial=True) == ("h", 1)
    with pytest.raises(InvalidRequest, match="'h:0' is not host:port"):
        parse_address("h:0", to_dial=True)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:1",
        "[::]:1",
        "0:1",
        "0x0:1",
        "0.0:1",
        "[::ffff:0.0.0.0]:1",
        "224.0.0.1:1",
        "[ff02::1]:1",
        "255.255.255.255:1",
        "h:0",
    ],
)
def test_what_nobody_can_dial_is_nothing_to_tell_others(address: str) -> None:
    with pytest.raises(ValueError, match=re.escape(address)):
        checked_address(address, for_others=True)


@pytest.mark.parametrize("address", ["10.0.0.7:1", "127.0.0.1:1", "localhost:1", "[fd00::7]:1", "[::ffff:10.0.0.7]:1"])
def test_what_somebody_can_dial_may_be_told(address: str) -> None:
    assert checked_address(address, for_others=True) == address


def test_which_hosts_are_any_and_which_loopback() -> None:
    hosts = ("0.0.0.0", "::", "127.0.1.1", "::1", "localhost", "10.0.0.7", "fd00::7", "h")
    kinds = {host: (HostPort(host, 1).is_any, HostPort(host, 1).is_loopback) for host in hosts}
    assert [host for host, (is_any, _) in kinds.items() if is_any] == ["0.0.0.0", "::"]
    assert [host for host, (_, is_loopback) in kinds.items() if is_loopback] == ["127.0.1.1", "::1", "localhost"]


def test_grpc_never_takes_a_host_for_a_scheme() -> None:
    assert grpc_target("unix:1") == "dns:///unix:1"
    assert grpc_target("[fe80::1%eth0]:1") == "dns:///[fe80::1%25eth0]:1"


def routes(monkeypatch: pytest.MonkeyPatch, hosts: dict[int, str]) -> None:
    monkeypatch.setattr(addresses, "_routed", lambda family: hosts.get(family))


def names(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    families = {host: socket.AF_INET6 if ":" in host else socket.AF_INET for host in hosts}
    found: list[Any] = [(family, 0, 0, "", (host, 0)) for host, family in families.items()]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)


def test_every_interface_is_told_as_the_one_that_routes_outward(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, "127.0.1.1")  # as Debian has it in /etc/hosts
    routes(monkeypatch, {socket.AF_INET: "10.1.2.3", socket.AF_INET6: "fd00::3"})
    assert str(address_for_others(HostPort("0.0.0.0", 7001))) == "10.1.2.3:7001"
    assert str(address_for_others(HostPort("::", 7001))) == "[fd00::3]:7001"
    routes(monkeypatch, {socket.AF_INET: "10.1.2.3"})
    assert str(address_for_others(HostPort("::", 7001))) == "10.1.2.3:7001", "gRPC serves IPv4 there too"
    for host in ("127.0.0.1", "::1", "10.9.9.9", "worker"):
        assert address_for_others(HostPort(host, 1)) == (host, 1), "told as it is"


def test_without_a_route_the_hosts_name_helps_where_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    routes(monkeypatch, {})
    names(monkeypatch, "127.0.1.1", "fe80::1", "10.5.5.5", "fd00::5")
    assert [outward_host([socket.AF_INET]), outward_host([socket.AF_INET6])] == ["10.5.5.5", "fd00::5"]
    assert caplog.text == ""
    names(monkeypatch, "127.0.1.1", "::1", "fe80::1")
    assert [outward_host([socket.AF_INET]), outward_host([socket.AF_INET6])] == ["127.0.0.1", "::1"]
    assert "--advertise" in caplog.text


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    routes(monkeypatch, {})
    monkeypatch.setattr(addresses, "RESOLVE_S", 0.05)
    answered = threading.Event()
    hangs: list[Any] = [(socket.AF_INET, 0, 0, "", ("10.5.5.5", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: hangs if answered.wait(30) else [])
    begun_s = time.monotonic()
    assert outward_host([socket.AF_INET]) == "127.0.0.1"
    assert time.monotonic() - begun_s < 10
    answered.set()


def test_a_socket_finds_the_interface_and_sends_nothing() -> None:
    """Of this machine, whatever it has: an address of its own that is not the loopback one, or none."""
    for family in (socket.AF_INET, socket.AF_INET6):
        host = addresses._routed(family)
        if host is not None:
            assert not HostPort(host, 1).is_loopback
            with socket.socket(family, socket.SOCK_DGRAM) as own:
                own.bind((host, 0))  # raises where it is not of this machine


@pytest.mark.parametrize(
    ("listen", "advertise", "told"),
    [
        ("0.0.0.0:0", None, "10.1.2.3:PORT"),
        ("0.0.0.0:0", "worker.example:7001", "worker.example:7001"),
        ("127.0.0.1:0", None, "127.0.0.1:PORT"),
        ("127.0.0.1:0", "[fd00::9]:1", "[fd00::9]:1"),
    ],
)
async def test_what_a_worker_tells(
    listen: str, advertise: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.proto.prefill_pb2 import DESCRIPTOR

    routes(monkeypatch, {socket.AF_INET: "10.1.2.3"})
    server = WorkerServer(WORKER_ROLE_PREFILL, listen, advertise, None, Transport())
    await server.open(DESCRIPTOR.services_by_name["Prefill"], lambda _: None, lambda _: None)
    try:
        report, port = server.report(), parse_address(server.bound).port
        assert port
        assert (report.address, report.advertise) == (told.replace("PORT", str(port)), advertise or "")
        assert report.worker_id == f"prefill-{socket.gethostname()}-{parse_address(report.address).port}"
    finally:
        await server.close()
