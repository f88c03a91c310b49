"""Which certificates a client uses, and that it never takes plain text for granted."""

import os
import socket
import stat
from pathlib import Path

import psutil
import pytest
from support.certificates import CertificateFiles

from isthmus.cluster.client.security import Certificates, client_security, server_role
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.security.certificates import describe, own_hosts
from isthmus.proto.security.settings import security_of
from isthmus.proto.security.state import forget_port, note_port, state_folder


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("ISTHMUS_TLS")


def test_a_gateway_of_this_user_is_known_by_its_port() -> None:
    note_port(7001, "prod", "gateway")
    note_port(7002, "prod", "supervisor")
    note_port(7003, "", "gateway")
    security = client_security("127.0.0.1:7001")
    assert security is not None
    assert (security.cluster, security.roles, server_role("localhost:7001")) == ("prod", {"admin", "client"}, "gateway")
    assert server_role("[::1]:7002") == "supervisor"
    assert client_security("127.0.0.1:7003") is None, "it has written down itself that it is plain text"
    forget_port(7003)
    assert client_security("127.0.0.1:7003") is not None


def test_plain_text_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = client_security("127.0.0.1:7009")
    assert unknown is not None and unknown.cluster == "local"
    with pytest.raises(InvalidRequest, match=r"no CA is known for 10\.0\.0\.5:7001: name its CA with --ca"):
        client_security("10.0.0.5:7001")
    monkeypatch.setenv("ISTHMUS_TLS", "off")
    assert client_security("10.0.0.5:7001") is None
    monkeypatch.setenv("ISTHMUS_TLS", "of")
    with pytest.raises(InvalidRequest, match="ISTHMUS_TLS is 'of': allowed: auto, off"):
        client_security("10.0.0.5:7001")


def test_files_that_are_named_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = CertificateFiles(tmp_path / "files").files("client")
    named = Certificates(ca=Path(files["ca"]))
    monkeypatch.setenv("ISTHMUS_TLS", "off")
    security = client_security("127.0.0.1:7001", named)
    assert security is not None and security.expected_name("gateway") is None, "known by its host"
    for name, path in files.items():
        monkeypatch.setenv(f"ISTHMUS_{name.upper()}", path)
    both = client_security("10.0.0.5:7001")
    assert both is not None and both.roles == {"client"}
    with pytest.raises(InvalidRequest, match="a certificate needs its key and a CA"):
        client_security("10.0.0.5:7001", Certificates(ca=Path(files["ca"]), cert=Path(files["cert"])))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        client_security("10.0.0.5:7001", Certificates(ca=tmp_path / "none"))


def test_the_state_folder_is_for_its_user_alone() -> None:
    first, again = security_of("auto", "prod", "prefill"), security_of("auto", "prod", "decode")
    assert first is not None and again is not None
    assert first.roles == {"prefill", "decode"}, "so that it may flip"
    assert first.current() == again.current(), "made by whoever comes first"
    paths = [state_folder(), state_folder() / "prod", *(state_folder() / "prod").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o600}


def test_certificates_are_made_anew_before_they_end_and_with_their_ca() -> None:
    folder = state_folder() / "prod"
    before = security_of("auto", "prod", "gateway")
    assert before is not None
    old = before.current()[1]
    year_ago = (folder / "gateway.crt").stat().st_mtime - 300 * 86_400
    for name in ("ca.crt", "gateway.crt"):
        os.utime(folder / name, (year_ago, year_ago))
    renewed = security_of("auto", "prod", "gateway")
    assert renewed is not None
    new = renewed.current()[1]
    assert new.ca == old.ca and new.pair != old.pair
    (folder / "ca.key").unlink()
    (folder / "ca.crt").unlink()
    other = security_of("auto", "prod", "gateway")
    assert other is not None and other.current()[1].ca != old.ca


def test_a_certificate_is_good_for_where_its_server_listens_and_stays_good_for_others() -> None:
    def hosts() -> set[str]:
        return set(describe((state_folder() / "prod" / "gateway.crt").read_bytes())[0].hosts)

    security_of("auto", "prod", "gateway", listening=("127.0.0.1", "localhost", "::1"))
    usual = hosts()
    assert usual == set(own_hosts()), "no address of this host is told to nobody's use"
    security_of("auto", "prod", "gateway", listening=("0.0.0.0",))
    every = hosts()
    addresses = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == 2}
    assert addresses <= every | {"127.0.0.1"} and usual <= every
    security_of("auto", "prod", "gateway", listening=("llm.example.com",))
    assert hosts() == every | {"llm.example.com"}
    before = (state_folder() / "prod" / "gateway.crt").read_bytes()
    security_of("auto", "prod", "gateway", listening=("0.0.0.0",))
    assert (state_folder() / "prod" / "gateway.crt").read_bytes() == before, "it was good already"


def test_a_host_whose_name_is_none_of_dns_has_a_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "my_box")
    assert security_of("auto", "prod", "gateway", listening=("0.0.0.0",)) is not None


def test_the_own_address_is_known_as_loopback_is_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cluster.client.security.is_own", lambda host: host == "192.0.2.7")
    security_of("auto", "prod", "gateway")
    note_port(7001, "prod", "gateway")
    found = client_security("192.0.2.7:7001")
    assert found is not None and found.roles == {"admin", "client"}
    with pytest.raises(InvalidRequest, match="no CA is known"):
        client_security("192.0.2.8:7001")
    note_port(7001, "", "gateway")
    with pytest.raises(InvalidRequest, match="no CA is known"):
        client_security("192.0.2.7:7001")
    with pytest.raises(InvalidRequest, match=r"dial 127\.0\.0\.1:7001"):
        client_security("0.0.0.0:7001")
