"""What a person who has started a gateway may try next."""

from pathlib import Path

import pytest

from isthmus.cluster.cli.terminal.hints import hints
from isthmus.cluster.config import ClusterConfig
from isthmus.proto.rpc import addresses
from isthmus.proto.security.settings import TlsFiles
from isthmus.proto.security.state import state_folder

KEYS = {"access": {"keys_file": "keys.json"}}
FILES = TlsFiles(ca=Path("/etc/ca.crt"), cert=Path("c"), key=Path("k"))
ABOUT_KEY = "@FILE is a file with a key, as `isthmus keys add --keys-file keys.json --tenant NAME` prints it"


@pytest.fixture(autouse=True)
def _routed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISTHMUS_TLS", raising=False)
    monkeypatch.setattr(addresses, "outward_host", lambda families: "10.0.0.5")


def told(address: str, **settings: object) -> list[str]:
    return hints(ClusterConfig(**settings), address)  # pyright: ignore[reportArgumentType]


def test_on_this_host_nothing_is_asked_for() -> None:
    assert told("127.0.0.1:50051") == ['try: isthmus generate --chat "Why is the sky blue?"']
    assert told("127.0.0.1:7000") == ['try: isthmus generate --chat --server 127.0.0.1:7000 "Why is the sky blue?"']


def test_for_others_the_line_has_key_and_ca() -> None:
    first, second, third = told("0.0.0.0:7000", gateway=KEYS)
    assert first == 'try: isthmus generate --chat --server 127.0.0.1:7000 --api-key @FILE "Why is the sky blue?"'
    assert second == f"{ABOUT_KEY}; ISTHMUS_API_KEY has the same"
    ca = state_folder() / "local" / "ca.crt"
    options = "--server 10.0.0.5:7000 --ca ca.crt --api-key @FILE"
    assert third == f"from other hosts: {options}, where ca.crt is a copy of {ca} of this host"


def test_with_other_certificates_or_none() -> None:
    anonymous = {"access": {"anonymous": True}}
    first, second = told("10.0.0.5:7000", gateway=anonymous, tls=FILES)
    assert first == 'try: isthmus generate --chat --server 10.0.0.5:7000 --ca /etc/ca.crt "Why is the sky blue?"'
    about = "where ca.crt is a copy of /etc/ca.crt of this host, and HOST one that c is for"
    assert second == f"from other hosts: --server HOST:7000 --ca ca.crt, {about}"
    plain = told("0.0.0.0:7000", gateway=anonymous, tls="off")[1]
    assert plain == "from other hosts: --server 10.0.0.5:7000, with ISTHMUS_TLS=off: in plain text"


def test_a_client_is_told_to_show_a_certificate_where_it_must() -> None:
    asking = FILES.model_copy(update={"client_certificates": True})
    first, second, third, fourth = told("0.0.0.0:7000", gateway=KEYS, tls=asking)
    assert "--ca /etc/ca.crt --cert tls.crt --key tls.key --api-key @FILE" in first
    assert "certs issue --role client" in second
    assert third.startswith(ABOUT_KEY)
    assert "--server HOST:7000 --ca ca.crt --cert tls.crt --key tls.key --api-key @FILE" in fourth
