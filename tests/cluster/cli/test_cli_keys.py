"""`isthmus keys`, and clients that show a key: what is printed, and where a key never is."""

import json
import os
import re
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from scripted import in_thread, says, scripted_cluster

from isthmus.cluster.access.key_file import KeyDocument, change, parse_table
from isthmus.cluster.access.keys import PATTERN, new_key
from isthmus.cluster.access.settings import AccessSettings, Limits
from isthmus.cluster.cli.main import run
from isthmus.cluster.client.credentials import ApiKey
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.rpc.transport import Transport

KEY, RECORD = new_key("acme", limits=Limits(max_priority="standard"))


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One that lets in who has KEY, in a thread of its own."""
    folder = tmp_path_factory.mktemp("keys")
    change(folder / "keys.json", lambda _: KeyDocument(keys=(RECORD,)))
    access = AccessSettings(keys_file=str(folder / "keys.json"))
    with in_thread(
        scripted_cluster(says("hello"), access=access, jobs_db=f"sqlite:///{folder / 'jobs.db'}")
    ) as running:
        yield running


@pytest.fixture(scope="module")
def server(gateway: Gateway) -> str:
    return gateway.address


@pytest.fixture(autouse=True)
def no_key_of_the_person_who_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ISTHMUS_API_KEY", "ISTHMUS_PLAINTEXT_KEY", "ISTHMUS_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_a_key_goes_to_stdout_alone_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    code, out, err = outcome(capsys, "keys", "add", "--keys-file", str(path), "--tenant", "acme", "--running", "3")
    assert (code, PATTERN.fullmatch(out[:-1]) is not None, out[-1]) == (0, True, "\n")
    key = out[:-1]
    assert key not in err
    assert "this is shown once" in err
    record = parse_table(path.read_bytes()).verify(key)
    assert (record.tenant, record.limits, stat.S_IMODE(path.stat().st_mode)) == ("acme", Limits(running=3), 0o600)
    for arguments in (("list",), ("list", "--json"), ("revoke", record.id), ("list", "--json")):
        _, out, err = outcome(capsys, "keys", arguments[0], "--keys-file", str(path), *arguments[1:])
        assert key[-43:] not in out + err
        assert record.hash not in out + err
    assert json.loads(out)[0]["state"] == "revoked"


def test_the_list_tells_tenant_state_and_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.json")
    add = ("keys", "add", "--keys-file", path, "--tenant")
    outcome(capsys, *add, "web", "--name", "site", "--expires", "2d", "--max-priority", "batch", "--weight", "2.5")
    outcome(capsys, *add, "web")
    code, out, _ = outcome(capsys, "keys", "list", "--keys-file", path)
    rows = [re.split(r" {2,}", line) for line in out.splitlines()]
    assert (code, rows[0]) == (0, ["key", "tenant", "state", "created", "expires", "limits", "name"])
    assert rows[1][1:3] + rows[1][5:] == ["web", "valid", "weight=2.5,max_priority=batch", "site"]
    assert rows[2][1:3] + rows[2][4:] == ["web", "valid", "never", "none", "-"]
    expires = datetime.fromisoformat(
        json.loads(outcome(capsys, "keys", "list", "--keys-file", path, "--json")[1])[0]["expires"]
    )
    assert timedelta(days=1.9) < expires - datetime.now(UTC) <= timedelta(days=2)


def test_the_file_may_be_that_of_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text(f"gateway: {{access: {{keys_file: {tmp_path / 'one.json'}}}}}\n")
    assert outcome(capsys, "keys", "add", "--config", str(settings), "--tenant", "a")[0] == 0
    monkeypatch.setenv("ISTHMUS_GATEWAY__ACCESS__KEYS_FILE", str(tmp_path / "two.json"))
    assert outcome(capsys, "keys", "add", "--tenant", "a")[0] == 0
    assert {path.name for path in tmp_path.glob("*.json")} == {"one.json", "two.json"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("add", "--tenant", "a"), 2, "which file? Name it with --keys-file"),
        (("add", "--keys-file", "FILE", "--tenant", ""), 2, "tenant is '': String should have at least 1 character"),
        (("add", "--keys-file", "FILE", "--tenant", "a" * 129), 2, "String should have at most 128 characters"),
        (
            ("add", "--keys-file", "FILE", "--tenant", "a", "--max-priority", "x"),
            2,
            "max_priority is 'x': Input should",
        ),
        (("add", "--keys-file", "FILE", "--tenant", "a", "--weight", "0"), 2, "weight is 0.0: Input should be greater"),
        (("add", "--keys-file", "FILE", "--tenant", "a", "--weight", "nan"), 2, "finite number"),
        (("add", "--keys-file", "FILE", "--tenant", "a", "--expires", "soon"), 2, "'soon' is no time; allowed: 90d"),
        (("add", "--keys-file", "FILE", "--tenant", "a", "--expires", "2020-01-01"), 2, "is over already"),
        (("revoke", "--keys-file", "EMPTY", "x"), 1, "NOT_FOUND: no key 'x' in the file; nothing was changed"),
        (("list", "--keys-file", "BAD"), 1, "is not a file of API keys"),
        (("add", "--keys-file", "BAD", "--tenant", "a"), 1, "is not a file of API keys"),
        (("add", "--keys-file", "BAD/x/keys.json", "--tenant", "a"), 1, "cannot be written: "),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_text("nonsense")
    (tmp_path / "empty").touch()
    places = {"FILE": str(tmp_path / "keys.json"), "BAD": str(tmp_path / "bad"), "EMPTY": str(tmp_path / "empty")}
    words = [re.sub("^(FILE|BAD|EMPTY)", lambda found: places[found[1]], word) for word in arguments]
    found, out, err = outcome(capsys, "keys", *words)
    assert (found, out, message in err) == (code, "", True), err
    assert (tmp_path / "bad").read_text() == "nonsense"


def test_clients_show_the_key_of_option_variable_or_file(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("generate", "--server", server, "hi")
    code, out, err = outcome(capsys, *ask)
    assert (code, out, err.startswith("error: UNAUTHENTICATED: no API key or token: ")) == (1, "", True)
    assert outcome(capsys, *ask, "--api-key", KEY) == (0, "hello\n", "")
    (tmp_path / "key").write_text(KEY + "\n")
    assert outcome(capsys, *ask, "--api-key", f"@{tmp_path / 'key'}") == (0, "hello\n", "")
    code, _, err = outcome(capsys, *ask, "--api-key", f"@{tmp_path / 'none'}")
    assert (code, "cannot be read" in err) == (2, True)
    monkeypatch.setenv("ISTHMUS_API_KEY", KEY)
    assert outcome(capsys, *ask) == (0, "hello\n", "")
    assert outcome(capsys, *ask, "--api-key", KEY[:-1] + "!")[0] == 1
    for arguments in (("jobs", "list"), ("jobs", "submit", "x", "--watch")):
        assert outcome(capsys, *arguments, "--server", server)[0] == 0


def test_batch_runs_and_jobs_show_it_too(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "max_tokens": 5}\n')
    run_it = (
        "batch",
        "run",
        str(tmp_path / "in.jsonl"),
        "-o",
        str(tmp_path / "out.jsonl"),
        "--server",
        server,
        "--json",
    )
    assert outcome(capsys, *run_it)[0] == 1
    code, out, _ = outcome(capsys, *run_it, "--api-key", KEY)
    assert (code, json.loads(out)["answered"]) == (0, 1)
    code, _, err = outcome(
        capsys, "jobs", "submit", "x", "--priority", "interactive", "--server", server, "--api-key", KEY
    )
    assert (code, err) == (1, "error: PERMISSION_DENIED: your largest priority is standard\n")
    code, _, err = outcome(capsys, "jobs", "list", "--tenant", "other", "--server", server, "--api-key", KEY)
    assert (code, err.startswith("error: PERMISSION_DENIED: you ask as another tenant ('other')")) == (1, True)


@pytest.mark.parametrize("command", [("generate",), ("chat",), ("jobs", "list"), ("batch", "run"), ("config", "show")])
def test_a_key_is_in_no_help_and_in_no_settings(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "200")
    for arguments in (("--help",), ("--no-such-option",), *([(), ("--json",)] if command[0] == "config" else [])):
        _, out, err = outcome(capsys, *command, *arguments)
        assert out + err
        assert KEY[-43:] not in re.sub(r"\W", "", out + err).replace("_", "") + out + err
    assert os.environ["ISTHMUS_API_KEY"] == KEY


def test_no_key_goes_over_a_network_in_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "generate", "--server", "203.0.113.1:1", "--api-key", KEY, "hi")
    assert code == 1
    assert err.startswith("error: INVALID_ARGUMENT: an API key would go to 203.0.113.1:1 in plain text")
    assert KEY not in err
    transport = Transport()
    for address in ("10.0.0.7:1", "host.example:1", "0.0.0.0:1", "[2001:db8::1]:1"):
        with pytest.raises(InvalidRequest, match="in plain text"):
            ApiKey(KEY).check(address, transport)
        ApiKey(KEY, over_plaintext=True).check(address, transport)
    for address in ("127.0.0.1:1", "[::1]:1", "localhost:1"):
        ApiKey(KEY).check(address, transport)


@pytest.mark.parametrize("text", ["", "a b", "a\nb", "ä", "a\0", 'a"'])
def test_what_can_be_no_key(text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ApiKey(text)
    assert text == "" or text not in str(raised.value)
    assert KEY not in repr(ApiKey(KEY)) + str(ApiKey(KEY))


def test_servers_for_others_want_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ("up", "--host", "0.0.0.0"),
        ("gateway", "--listen", "0.0.0.0:0", "--workers", "127.0.0.1:1"),
        ("gateway", "--listen", "[::]:0", "--workers", "127.0.0.1:1"),
    ):
        code, _, err = outcome(capsys, *command)
        assert (code, "everybody could ask" in err, "isthmus keys add" in err) == (1, True, True), err


def test_status_tells_who_may_ask_and_who_was_refused(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    outcome(capsys, "generate", "--server", gateway.address, "--api-key", "isthmus_wrong", "hi")
    code, out, _ = outcome(capsys, "status", "--admin", gateway.admin_address)
    *_, refused, last = out.splitlines()
    assert (code, " · access: keys (1 valid)" in last) == (0, True)
    assert re.search(r"^refused: .*unknown \d+", refused)
    _, out, _ = outcome(capsys, "status", "--admin", gateway.admin_address, "--json")
    access = json.loads(out)["access"]
    assert (access["mode"], access["keys"], int(access["refused"]["unknown"]) >= 1) == ("keys", 1, True)


def test_a_file_that_everybody_may_write_is_not_made_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    change(path, lambda _: KeyDocument(keys=(RECORD,)))
    path.chmod(0o666)
    code, out, err = outcome(capsys, "keys", "add", "--keys-file", str(path), "--tenant", "x")
    assert (code, out, "may be written by everybody" in err) == (1, "", True)
    assert path.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("command", [("list",), ("list", "--json"), ("revoke", "1f3a5c7e90b2d4f6")])
def test_a_file_that_is_not_there_is_an_error_that_says_what_makes_one(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "folder" / "keys.json"
    code, out, err = outcome(capsys, "keys", command[0], "--keys-file", str(path), *command[1:])
    hint = f"isthmus keys add --keys-file {path} --tenant NAME makes it"
    assert (code, out, err) == (1, "", f"error: NOT_FOUND: there is no file {path}: {hint}\n")
    assert not path.parent.exists()
