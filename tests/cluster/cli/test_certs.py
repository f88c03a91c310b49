"""`isthmus certs`: a CA, certificates of it, and what they say."""

import json
import stat
from pathlib import Path

import pytest

from isthmus.cluster.cli.main import run
from isthmus.proto.security.certificates import KeyPair, check, describe


def issue(folder: Path, *arguments: str, out: str = "some") -> int:
    return run(["certs", "issue", "--ca-dir", str(folder / "ca"), "--out", str(folder / out), *arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert run(["certs", "init", "prod", "--out", str(tmp_path / "ca")]) == 0
    return tmp_path


def test_files_are_for_their_owner_alone_and_go_together(folder: Path) -> None:
    assert issue(folder, "--role", "prefill", "--role", "decode,gateway", "--host", "10.0.0.7", "--name", "a b") == 0
    for each in ("ca", "some"):
        assert stat.S_IMODE((folder / each).stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in (folder / each).iterdir()} == {0o600}
    ca, cert, key = ((folder / "some" / name).read_bytes() for name in ("ca.crt", "tls.crt", "tls.key"))
    assert ca == (folder / "ca" / "ca.crt").read_bytes()
    found = check(ca, KeyPair(cert, key))
    assert found is not None
    assert list(map(str, found.identities)) == [
        f"isthmus://prod/{role}/a%20b" for role in ("prefill", "decode", "gateway")
    ]
    assert [each.name for each in found.identities] == ["a b"] * 3
    assert found.hosts == ("10.0.0.7", "localhost", "127.0.0.1", "::1")
    assert 364 < found.days_left() <= 365
    (of_ca,) = describe(ca)
    assert of_ca.is_ca and not found.is_ca


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "ca" / "ca.key").read_bytes()
    assert run(["certs", "init", "prod", "--out", str(folder / "ca")]) == 1
    assert "ca.crt is there already; name another folder with --out" in capsys.readouterr().err
    assert (folder / "ca" / "ca.key").read_bytes() == before
    assert issue(folder, "--role", "admin") == 0
    assert issue(folder, "--role", "admin") == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--role", "boss"), "role 'boss'; allowed: gateway, supervisor, prefill, decode, admin, client"),
        (("--role", "admin", "--host", "no host"), "'no host' is no host name and no address"),
        (("--role", "admin", "--cluster", "Prod!"), "cluster 'Prod!'; allowed: a-z, 0-9 and -"),
    ],
)
def test_what_cannot_be_is_told(
    arguments: tuple[str, ...], problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert issue(folder, *arguments) == 1
    assert problem in capsys.readouterr().err
    assert not (folder / "some").exists()


def test_a_certificate_that_is_no_ca_signs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert issue(folder, "--role", "decode") == 0
    (folder / "some" / "ca.crt").write_bytes((folder / "some" / "tls.crt").read_bytes())
    (folder / "some" / "tls.key").rename(folder / "some" / "ca.key")
    own = ["--ca-dir", str(folder / "some"), "--cluster", "prod", "--role", "gateway", "--out", str(folder / "forged")]
    assert run(["certs", "issue", *own]) == 1
    assert "is not a CA" in capsys.readouterr().err


def test_show_tells_for_whom_and_how_long(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert issue(folder, "--role", "gateway", "--host", "llm.example.com", "--days", "3") == 0
    capsys.readouterr()
    file = folder / "some" / "tls.crt"
    assert run(["certs", "show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "isthmus://prod/gateway/some" in shown and "llm.example.com" in shown and "3 days" in shown
    assert run(["certs", "show", "--json", str(file), str(folder / "ca" / "ca.crt")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["is_ca"] for entry in found] == [False, True]
    assert found[0]["hosts"] == ["llm.example.com", "localhost", "127.0.0.1", "::1"]
    assert run(["certs", "show", str(folder / "ca" / "ca.key")]) == 1
    assert "not a certificate" in capsys.readouterr().err
