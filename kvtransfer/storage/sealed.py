"""Pages encrypted at rest, with a key for each tenant that can be dropped.

    FOLDER/s-…/key                 the tenant's name and a random secret of 32 bytes, encrypted
    FOLDER/s-…/ab/abcd….sealed     …: a keyed hash of the tenant's name; abcd…: one of the page's hash and encoding

All keys come from one secret (the file `store_key_file`) by HKDF-SHA256 (RFC 5869). A tenant's key takes the random
secret in its `key` file too: without that file nobody can make it again, whoever has the store's secret.

    file:  magic (8) | salt (32, random) | page, encrypted | tag (16)

AES-256-GCM. A nonce must never be used twice with one key: here each file has a key and a nonce of its own, 44 bytes of
HKDF-Expand over the tenant's key and the file's salt. Two files have the same only where two salts of 256 random bits
are equal: after 2^64 files of one tenant that has happened with a chance of under 2^-128. The nonces of `key` files are
96 random bits with one key: after 2^24 tenants the chance that two are equal is under 2^-48.

The tag covers the tenant's folder, the file's name and the header (`places.py`: format version, model, codec, page hash
and more), which is not written: the reader makes it. A file under another name, of another tenant or of another form is
a damaged one.
"""

import hmac
import os
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from ..encoded import PageFormat, PageKey
from .places import Parts, page_bytes, page_header
from .private import create, make_folder, make_private

KEY_FILE, SEALED = "key", "s-"
MAX_PAGE = (1 << 31) - 1  # bytes that one call encrypts
_MAGIC = b"ISTHMUSE"
_SALT, _NONCE, _KEY, _TAG = 32, 12, 32, 16
_MOST_KEYS = 1024  # of tenants, in memory


@dataclass(frozen=True)
class _TenantKeys:
    stamp: tuple[int, ...]  # of the key file that they come from
    pages: bytes
    names: bytes


class SealedPlaces:
    """Pages encrypted; `Places` says what the methods do."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        """`secret`: 32 random bytes or more (`private.read_secret`)."""
        self._folder = folder
        self._ids = _derive(secret, b"tenant folders")
        self._wrap = AESGCM(_derive(secret, b"key files"))
        self._secret = secret
        self._keys: dict[str, _TenantKeys] = {}
        self._lock = threading.Lock()

    def folder_of(self, tenant: str) -> str:
        return SEALED + hmac.digest(self._ids, tenant.encode(), "sha256")[:16].hex()

    def tenant_of(self, folder: str) -> str | None:
        """The tenant whose folder that is; None where its key file is gone, damaged or of another secret."""
        return found[0] if (found := self._unwrap(folder)) else None

    def name(self, key: PageKey, tenant: str, *, make: bool) -> str | None:
        keys = self._keys_of(tenant, make=make)
        if keys is None:
            return None
        digits = hmac.digest(keys.names, key.hash + key.encoding.encode(), "sha256")[:16].hex()
        return os.path.join(self.folder_of(tenant), digits[:2], f"{digits}.sealed")

    def content(self, form: PageFormat, key: PageKey, name: str, tenant: str, page: memoryview) -> Parts:
        keys = self._keys_of(tenant, make=True)
        if keys is None or len(page) > MAX_PAGE:
            raise OSError("the tenant's key is gone, or the page is too large to encrypt")
        salt = secrets.token_bytes(_SALT)
        aes, nonce = _of_file(keys.pages, salt)
        return [_MAGIC, salt, aes.encrypt(nonce, page, _bound(form, key, name))]

    def parse(self, form: PageFormat, key: PageKey, name: str, tenant: str, content: bytes) -> memoryview | None:
        keys, start = self._keys_of(tenant, make=False), len(_MAGIC) + _SALT
        if keys is None or content[: len(_MAGIC)] != _MAGIC or len(content) != start + page_bytes(form, key) + _TAG:
            return None
        aes, nonce = _of_file(keys.pages, content[len(_MAGIC) : start])
        try:
            return memoryview(aes.decrypt(nonce, memoryview(content)[start:], _bound(form, key, name)))
        except InvalidTag:
            return None

    def _keys_of(self, tenant: str, *, make: bool) -> _TenantKeys | None:
        """A tenant's keys, while its key file is the one that they come from: a process that runs forgets them too."""
        folder = self.folder_of(tenant)
        with self._lock:
            known, stamp = self._keys.get(folder), _stamp(self._folder / folder / KEY_FILE)
            if known is not None and known.stamp == stamp:
                return known
            self._keys.pop(folder, None)
            found = self._unwrap(folder) if stamp else None
            if found is None or found[0] != tenant:
                if not make:
                    return None
                found = self._make(folder, tenant, damaged=stamp is not None)
            stamp = _stamp(self._folder / folder / KEY_FILE)
            if found is None or stamp is None:
                return None
            if len(self._keys) >= _MOST_KEYS:
                self._keys.clear()
            master = HKDF(SHA256(), _KEY, found[1], b"isthmus store 1 tenant\0" + tenant.encode()).derive(self._secret)
            keys = _TenantKeys(stamp, _expand(master, b"pages", _KEY), _expand(master, b"names", _KEY))
            self._keys[folder] = keys
            return keys

    def _make(self, folder: str, tenant: str, *, damaged: bool) -> tuple[str, bytes] | None:
        """Makes a tenant's key file, or takes the one that another process has just made."""
        make_private(self._folder)
        make_folder(self._folder / folder)
        path = self._folder / folder / KEY_FILE
        if damaged:
            with suppress(FileNotFoundError):
                path.unlink()
        nonce = secrets.token_bytes(_NONCE)
        packed = msgpack.packb([tenant, secrets.token_bytes(_SALT)])
        assert packed is not None
        fresh = path.with_name(f"{os.getpid()}-{secrets.token_hex(8)}.begun")
        try:
            with os.fdopen(create(fresh), "wb") as file:
                file.write(nonce + self._wrap.encrypt(nonce, packed, folder.encode()))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(fresh, path)
        finally:
            with suppress(OSError):
                fresh.unlink()
        return self._unwrap(folder)

    def _unwrap(self, folder: str) -> tuple[str, bytes] | None:
        """Tenant and secret in a key file."""
        try:
            content = (self._folder / folder / KEY_FILE).read_bytes()
            tenant, salt = msgpack.unpackb(self._wrap.decrypt(content[:_NONCE], content[_NONCE:], folder.encode()))
        except (OSError, ValueError, InvalidTag):
            return None
        return tenant, salt


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), _KEY, None, b"isthmus store 1 " + purpose).derive(secret)


def _expand(key: bytes, info: bytes, length: int) -> bytes:
    return HKDFExpand(SHA256(), length, info).derive(key)


def _of_file(key: bytes, salt: bytes) -> tuple[AESGCM, bytes]:
    material = _expand(key, b"file" + salt, _KEY + _NONCE)
    return AESGCM(material[:_KEY]), material[_KEY:]


def _bound(form: PageFormat, key: PageKey, name: str) -> bytes:
    """What a file's tag covers besides the page."""
    return name.encode() + b"\0" + page_header(form, key)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
