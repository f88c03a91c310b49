"""API keys: what proves one, and what the file of them says."""

import hashlib
import hmac
import random
import stat
import string
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from isthmus.cluster.access import key_file, keys
from isthmus.cluster.access.caller import Refused
from isthmus.cluster.access.key_file import KeyDocument, change, parse, parse_table, read
from isthmus.cluster.access.keys import KeyTable, new_key, widest
from isthmus.cluster.access.settings import Limits
from isthmus.cluster.access.watched_file import SETTLED_S, WatchedFile
from isthmus.proto.errors import InvalidRequest


def reason(table: KeyTable, text: str) -> str:
    """What a key is refused for."""
    with pytest.raises(Refused) as raised:
        table.verify(text)
    return raised.value.reason


def test_a_key_proves_itself_and_is_not_in_its_record() -> None:
    key, record = new_key("acme", limits=Limits(running=2))
    assert keys.PATTERN.fullmatch(key)
    secret = key[-43:]
    assert secret not in record.model_dump_json()
    assert record.hash == hmac.new(bytes.fromhex(record.salt), secret.encode(), hashlib.sha256).hexdigest()
    assert KeyTable([record]).verify(key) == record


def test_two_keys_of_one_tenant_have_nothing_in_common() -> None:
    (one, first), (two, second) = new_key("acme"), new_key("acme")
    table = KeyTable([first, second])
    assert (table.verify(one).id, table.verify(two).id) == (first.id, second.id)
    assert len({first.id, second.id, first.salt, second.salt, first.hash, second.hash}) == 6
    crossed = f"{one[:24]}_{two[-43:]}"  # the id of one, the secret of the other
    assert reason(table, crossed) == "unknown"


def test_random_texts_are_no_keys() -> None:
    key, record = new_key("acme")
    table, drawn = KeyTable([record]), random.Random(1)
    for _ in range(500):
        length = drawn.randrange(0, 200)
        text = "".join(drawn.choice(string.printable + "ä€\0") for _ in range(length))
        assert reason(table, text) == "unknown"
    for end in range(len(key)):
        assert reason(table, key[:end]) == "unknown"
    for _ in range(200):
        at = drawn.randrange(len(key))
        other = drawn.choice([c for c in string.ascii_letters + string.digits + "-_" if c != key[at]])
        assert reason(table, key[:at] + other + key[at + 1 :]) == "unknown"
    for text in (key + "A", "\n" + key, key + "\n", key.upper(), "", "A" * 100_000, "\ud800"):
        assert reason(table, text) == "unknown"


def test_an_unknown_id_takes_the_steps_of_a_wrong_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a measurement, which would be noise: the same functions are called with arguments of the same sizes."""
    key, record = new_key("acme")
    table = KeyTable([record])
    steps: list[tuple[Any, ...]] = []
    compare, make = hmac.compare_digest, hmac.digest

    def comparing(a: bytes, b: bytes) -> bool:
        steps.append(("compare", len(a), len(b)))
        return compare(a, b)

    def digesting(salt: bytes, secret: bytes, name: str) -> bytes:
        steps.append(("digest", len(salt), len(secret), name))
        return make(salt, secret, name)

    monkeypatch.setattr(hmac, "compare_digest", comparing)
    monkeypatch.setattr(hmac, "digest", digesting)
    taken = []
    other_id = f"isthmus_{'0' * 16}_{key[-43:]}"
    wrong_secret = f"{key[:-43]}{'A' * 43}"
    for text in (other_id, wrong_secret):
        steps.clear()
        with pytest.raises(Refused) as raised:
            table.verify(text)
        taken.append((list(steps), str(raised.value), raised.value.reason))
    assert taken[0] == taken[1]
    assert taken[0][0] == [("digest", 16, 43, "sha256"), ("compare", 32, 32)]
    steps.clear()
    table.verify(key)
    assert steps == taken[0][0]


def test_only_the_right_secret_is_told_that_its_key_is_over() -> None:
    hour = timedelta(hours=1)
    key, record = new_key("acme", expires=datetime.now(UTC) - hour)
    assert reason(KeyTable([record]), key) == "expired"
    assert reason(KeyTable([record]), key[:-1] + ("A" if key[-1] != "A" else "B")) == "unknown"
    key, record = new_key("acme", expires=datetime.now(UTC) + hour)
    assert KeyTable([record]).verify(key).id == record.id
    revoked = record.model_copy(update={"revoked": datetime.now(UTC)})
    assert reason(KeyTable([revoked]), key) == "revoked"
    assert KeyTable([revoked]).valid() == 0


def test_a_key_ends_at_its_very_time(monkeypatch: pytest.MonkeyPatch) -> None:
    end = datetime(2030, 1, 1, tzinfo=UTC)
    key, record = new_key("acme", expires=end)
    table = KeyTable([record])
    monkeypatch.setattr(time, "time", lambda: end.timestamp() - 0.001)
    assert (table.verify(key), table.valid()) == (record, 1)
    monkeypatch.setattr(time, "time", end.timestamp)
    assert (reason(table, key), table.valid()) == ("expired", 0)


def test_the_limits_of_a_tenant_are_the_widest_of_its_valid_keys() -> None:
    over = datetime.now(UTC) - timedelta(hours=1)
    _, small = new_key("acme", limits=Limits(running=2, tokens_per_min=100, weight=3))
    _, large = new_key("acme", limits=Limits(running=5))
    _, gone = new_key("acme", limits=Limits(running=50), expires=over)
    table = KeyTable([small, large, gone])
    assert table.limits_of("acme") == Limits(running=5, weight=3)
    assert table.limits_of("other") is None
    assert KeyTable([gone]).limits_of("acme") is None
    assert widest([Limits(max_request_s=2), Limits(max_request_s=1)]) == Limits(max_request_s=2)


def test_the_file_is_its_owner_s_alone_and_keeps_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    records = [new_key(f"tenant {number}")[1] for number in range(3)]
    for record in records:
        change(path, lambda document, record=record: KeyDocument(keys=(*document.keys, record)))
    assert list(read(path).keys) == records
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o640)
    change(path, lambda document: document)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640  # a gateway of the group still reads it
    assert {entry.name for entry in path.parent.iterdir()} == {"keys.json", "keys.json.lock"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "keys.json")
    change(tmp_path / "link", lambda _: KeyDocument(keys=(new_key("a")[1],)))
    assert (tmp_path / "link").is_symlink()
    assert len(read(tmp_path / "keys.json").keys) == 1


def test_commands_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def add() -> None:
        for _ in range(5):
            change(path, lambda document: KeyDocument(keys=(*document.keys, new_key("a")[1])))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(path).keys) == 20


def test_an_edit_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    change(path, lambda _: KeyDocument(keys=(new_key("a")[1],)))
    before = path.read_bytes()
    monkeypatch.setattr(
        key_file.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InvalidRequest, match="cannot be written: No space left on device"):
        change(path, lambda _: KeyDocument())
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"keys.json", "keys.json.lock"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{}", "has no keys"),
        (b'{"keys": []}', "has no keys"),
        (b"null", "is not a file of API keys"),
        (b"keys: []", "is not a file of API keys"),
        (b'{"keys": [{"id": "x"}]}', "is not a file of API keys: keys.0.id"),
        (b'{"version": 2, "keys": []}', "is not a file of API keys: version"),
        (b'{"kyes": []}', "is not a file of API keys: kyes"),
        (b"\xff\xfe", "is not a file of API keys"),
        (b"[" * 100_000, "is not a file of API keys"),
    ],
)
def test_a_file_that_is_none_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_table(data)


def test_a_limit_that_is_spelled_wrongly_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    change(path, lambda _: KeyDocument(keys=(new_key("a", limits=Limits(running=1))[1],)))
    with pytest.raises(ValueError, match=r"keys\.0\.limits\.runing: Extra inputs"):
        parse(path.read_bytes().replace(b"running", b"runing"))


def test_two_records_of_one_id_are_refused() -> None:
    _, record = new_key("a")
    with pytest.raises(ValueError, match="is there twice"):
        parse(KeyDocument(keys=(record, record)).model_dump_json().encode())


def watched(path: Path) -> WatchedFile[KeyTable]:
    return WatchedFile(str(path), parse_table, key_file.MAX_BYTES)


def test_a_file_is_read_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    file = watched(path)
    file.refresh()
    assert (file.content, file.problem) == (None, f"{path} cannot be read: No such file or directory")
    key, record = new_key("a")
    change(path, lambda _: KeyDocument(keys=(record,)))
    file.refresh()
    assert file.content is not None
    assert (file.content.verify(key), file.problem) == (record, "")
    path.write_text("")
    file.refresh()
    assert (file.content, file.problem) == (None, f"{path} is empty")
    change(path, lambda _: KeyDocument(keys=(record,)))
    file.refresh()
    assert file.content is not None
    path.chmod(0o602)
    file.refresh()
    assert (file.content, file.problem) == (None, f"{path} may be written by everybody: chmod 600")
    path.unlink()
    path.mkdir()
    file.refresh()
    assert (file.content, file.problem) == (None, f"{path} cannot be read: Is a directory")


def test_a_file_that_stays_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = tmp_path / "keys.json", []
    change(path, lambda _: KeyDocument(keys=(new_key("a")[1],)))
    file = WatchedFile(str(path), lambda data: reads.append(len(data)), key_file.MAX_BYTES)
    for _ in range(3):
        file.refresh()
    assert len(reads) == 3  # written this moment: it may change within one tick of its clock
    later = time.time() + SETTLED_S + 1
    monkeypatch.setattr(time, "time", lambda: later)
    for _ in range(3):
        file.refresh()
    assert len(reads) == 4
    change(path, lambda _: KeyDocument(keys=(new_key("b")[1],)))
    file.refresh()
    assert len(reads) == 5


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(b" " * 1001)
    file = WatchedFile(str(path), parse_table, 1000)
    file.refresh()
    assert file.problem == f"{path} has more than 1000 bytes"


def test_whatever_is_wrong_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("x")

    def broken(data: bytes) -> KeyTable:
        raise RecursionError("a secret in an error")

    file = WatchedFile(str(path), broken, 1000)
    file.refresh()
    assert (file.content, file.problem) == (None, f"{path} cannot be used: RecursionError")
