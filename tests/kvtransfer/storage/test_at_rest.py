"""Pages at rest: nobody else reads the files, and with a secret nobody without it, nor once a tenant's key is gone."""

import os
import random
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import build_codec
from isthmus.kvtransfer.encoded import EncodedPage, PageFormat
from isthmus.kvtransfer.storage import private
from isthmus.kvtransfer.storage.private import MAKE_SECRET, make_private, read_secret
from isthmus.kvtransfer.storage.sealed import SealedPlaces
from isthmus.kvtransfer.storage.store import PageStore
from isthmus.kvtransfer.storage.tenants import forget_tenant, list_tenants
from isthmus.prefill.config import PrefillConfig
from isthmus.proto.errors import InvalidRequest

LAYERS = (LayerShape(kv_heads=2, head_dim=64),) * 2
FORM = PageFormat(
    model_fingerprint="m",
    codec=build_codec("tq-k4v4", LAYERS, 64),
    layers=LAYERS,
    page_tokens=64,
    dtype=torch.float32,
)
MIB = 1 << 20
SECRET, OTHER = b"s" * 32, b"o" * 32


def make_page(number: int) -> EncodedPage:
    page = FORM.blank(FORM.key(number.to_bytes(16, "big"), packed=True), 64, packed=True)
    page.data[:] = random.Random(number).randbytes(page.nbytes)
    return page


def write(folder: Path, tenant: str, *numbers: int, secret: bytes | None = SECRET) -> PageStore:
    """A closed store that has written a tenant's pages."""
    store = PageStore(folder, 64 * MIB, secret)
    for number in numbers:
        store.enqueue(FORM, make_page(number), tenant)
    store.close()
    return store


def read(folder: Path, tenant: str, number: int, secret: bytes | None = SECRET) -> bytes | None:
    store = PageStore(folder, 64 * MIB, secret)
    key = make_page(number).key
    assert key is not None
    found = store.read(FORM, key, tenant)
    store.close()
    return None if found is None else bytes(found.data)


def content(number: int) -> bytes:
    return bytes(make_page(number).data)


def sealed_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.sealed"))


def test_encrypted_pages_come_back_to_whoever_has_the_secret(tmp_path: Path) -> None:
    assert write(tmp_path, "a", 1, 2).counters["store_writes"] == 2
    assert write(tmp_path, "a", 1).counters["store_writes"] == 0
    assert (read(tmp_path, "a", 1), read(tmp_path, "a", 2)) == (content(1), content(2))
    assert read(tmp_path, "b", 1) is None
    assert read(tmp_path, "a", 1, OTHER) is None
    assert len(sealed_files(tmp_path)) == 2, "another secret has other names, and removes nothing"


def test_nothing_of_page_tenant_or_hash_is_in_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "research-team", 1)
    key = make_page(1).key
    assert key is not None
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    names = "".join(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    for secret in (content(1)[:16], content(1)[-16:], b"research", SECRET, key.hash):
        assert secret not in everything
        assert secret.hex() not in names
    assert "research" not in names


def test_two_files_of_one_page_share_no_bytes(tmp_path: Path) -> None:
    """The key and nonce of each file are its own."""
    found = []
    for _ in range(2):
        write(tmp_path, "a", 1)
        (path,) = sealed_files(tmp_path)
        found.append(path.read_bytes())
        path.unlink()
    first, second = found
    assert len(first) == len(second)
    assert sum(a == b for a, b in zip(first[8:], second[8:], strict=True)) < len(first) / 50


def test_no_nonce_is_used_twice_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, bytes]] = []

    class Watched:
        def __init__(self, key: bytes) -> None:
            self._key, self._inner = key, AESGCM(key)

        def encrypt(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
            used.append((self._key, nonce))
            return self._inner.encrypt(nonce, data, bound)

        def decrypt(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
            return self._inner.decrypt(nonce, data, bound)

    monkeypatch.setattr("isthmus.kvtransfer.storage.sealed.AESGCM", Watched)
    for tenant in ("a", "b"):
        write(tmp_path, tenant, *range(30))
    assert len(used) == len(set(used)) == 62  # two key files
    assert len({key for key, _ in used}) == 61


@pytest.mark.parametrize("offset", [0, 7, 8, 39, 40, 1000, -17, -1])
def test_any_changed_byte_is_a_counted_miss_and_the_file_goes(tmp_path: Path, offset: int) -> None:
    write(tmp_path, "a", 1)
    (path,) = sealed_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    store = PageStore(tmp_path, 64 * MIB, SECRET)
    key = make_page(1).key
    assert key is not None
    assert store.read(FORM, key, "a") is None
    store.close()
    assert store.counters["store_corrupt"] == 1
    assert sealed_files(tmp_path) == []


def test_files_cannot_be_swapped(tmp_path: Path) -> None:
    """Neither between names of a tenant, nor between tenants, nor between keys."""
    write(tmp_path, "a", 1, 2)
    first, second = sealed_files(tmp_path)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert (read(tmp_path, "a", 1), read(tmp_path, "a", 2)) == (None, None)
    write(tmp_path, "a", 1)
    write(tmp_path, "b", 1)
    places = SealedPlaces(tmp_path, SECRET)
    of_a, of_b = (tmp_path / places.folder_of(tenant) for tenant in ("a", "b"))
    (page_of_a,), (page_of_b,) = of_a.glob("*/*"), of_b.glob("*/*")
    page_of_b.write_bytes(page_of_a.read_bytes())
    assert (read(tmp_path, "b", 1), read(tmp_path, "a", 1)) == (None, content(1))
    (of_b / "key").write_bytes((of_a / "key").read_bytes())
    assert places.tenant_of(of_b.name) is None
    assert read(tmp_path, "b", 1) is None


def test_a_page_of_another_form_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, "a", 1)
    other = PageFormat(model_fingerprint="other", codec=FORM.codec, layers=LAYERS, page_tokens=64, dtype=torch.float32)
    key = make_page(1).key
    assert key is not None
    assert PageStore(tmp_path, 64 * MIB, SECRET).read(other, key, "a") is None


def test_a_tenant_without_its_key_is_erased_also_for_a_store_that_runs(tmp_path: Path) -> None:
    running = PageStore(tmp_path, 64 * MIB, SECRET)
    running.enqueue(FORM, make_page(1), "a")
    write(tmp_path, "a", 2)
    write(tmp_path, "b", 1)
    key = make_page(2).key
    assert key is not None
    assert running.read(FORM, key, "a") is not None
    copy = {path: path.read_bytes() for path in sealed_files(tmp_path)}
    sealed = SealedPlaces(tmp_path, SECRET)
    listed = {tenant.tenant: tenant.pages for tenant in list_tenants(tmp_path, sealed)}
    assert listed == {"a": listed["a"], "b": 1}
    assert forget_tenant(tmp_path, "a", sealed) == listed["a"]
    assert {tenant.tenant for tenant in list_tenants(tmp_path, sealed)} == {"b"}
    for path, content_ in copy.items():  # a thief, or a backup, has the files
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_)
    assert running.read(FORM, key, "a") is None, "and not the key"
    running.enqueue(FORM, make_page(3), "a")
    running.close()
    assert read(tmp_path, "a", 3) == content(3), "pages of afterwards have a new one"
    assert read(tmp_path, "a", 2) is None
    assert read(tmp_path, "b", 1) == content(1)


def test_forgetting_removes_plain_pages_too(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, 2, secret=None)
    assert [(t.tenant, t.sealed, t.pages) for t in list_tenants(tmp_path, None)] == [("a", False, 2)]
    assert forget_tenant(tmp_path, "a", None) == 2
    assert forget_tenant(tmp_path, "a", None) == 0
    assert list_tenants(tmp_path, None) == []
    assert read(tmp_path, "a", 1, None) is None


def test_a_damaged_key_file_costs_the_pages_and_no_more(tmp_path: Path) -> None:
    write(tmp_path, "a", 1)
    key = tmp_path / SealedPlaces(tmp_path, SECRET).folder_of("a") / "key"
    for damaged in (b"", b"x" * 60, key.read_bytes()[:-1]):
        key.write_bytes(damaged)
        assert read(tmp_path, "a", 1) is None
        write(tmp_path, "a", 1)
        assert read(tmp_path, "a", 1) == content(1)


def test_pages_of_before_there_was_a_secret_are_removed(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, secret=None)
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "abcd.packed").write_bytes(b"of an older version")
    write(tmp_path, "a", 2)
    assert [path.suffix for path in tmp_path.rglob("*/*/*") if path.is_file()] == [".sealed"]
    assert content(1) not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_and_folders_are_their_owners_alone_whatever_the_umask(
    tmp_path: Path, secret: bytes | None, umask: int
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "pages", "a", 1, 2, secret=secret)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "pages", *(tmp_path / "pages").rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_a_folder_that_is_open_is_tightened_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    PageStore(tmp_path, MIB).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InvalidRequest, match=r"is open to others \(it belongs to user .*pages"):
        PageStore(tmp_path, MIB)
    monkeypatch.undo()
    tmp_path.chmod(0o755)

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(InvalidRequest, match="its mode is 0755 and cannot be changed"):
        make_private(tmp_path)


def test_the_secret_is_made_by_the_command_and_read(tmp_path: Path) -> None:
    subprocess.run(["sh", "-c", MAKE_SECRET], cwd=tmp_path, check=True)
    assert len(read_secret(tmp_path / "store.key")) == 32
    assert stat.S_IMODE((tmp_path / "store.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("mode", "size", "reason"),
    [
        (0o644, 32, "has mode 0644 .* chmod 600"),
        (0o640, 32, "has mode 0640"),
        (0o620, 32, "has mode 0620"),
        (0o600, 31, "has 31 bytes; allowed: 32 to 4096 random ones"),
        (0o600, 0, "has 0 bytes"),
        (0o600, 5000, "has 4097 bytes"),
    ],
)
def test_a_secret_that_others_read_or_that_is_none_is_refused(
    tmp_path: Path, mode: int, size: int, reason: str
) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"x" * size)
    file.chmod(mode)
    with pytest.raises(InvalidRequest, match=reason):
        read_secret(file)


def test_other_secrets_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        read_secret(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InvalidRequest, match="is no ordinary file"):
        read_secret(tmp_path / "pipe")
    mounted = tmp_path / "mounted"
    mounted.write_bytes(SECRET)
    mounted.chmod(0o440)
    if os.geteuid() == 0:  # as Kubernetes mounts it: root's, readable by our group
        monkeypatch.setattr(private.os, "geteuid", lambda: 12345)
        assert read_secret(mounted) == SECRET
        mounted.chmod(0o444)
        with pytest.raises(InvalidRequest, match="has mode 0444"):
            read_secret(mounted)


def test_a_key_without_a_store_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="allowed: with store_dir only"):
        PrefillConfig(store_key_file="x")
