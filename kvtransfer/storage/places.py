"""Where a tenant's pages lie in the store's folder, and what their files hold: as they are, or sealed (`sealed.py`).

    FOLDER/t-…/ab/abcd….ENCODING     …: of the tenant's name; abcd…: the page's hash
    FOLDER/t-…/tenant                the tenant's name, for people

The content of a page's file:

    magic (8) | checksum (16) | header length (4) | header | page

The checksum is xxh3-128 of everything after it. The header is msgpack: format version, model fingerprint, codec, codec
parameter hash, page size, page hash, encoding, bytes of each layer. The page is in the wire layout.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgpack
import xxhash

from ..encoded import PageFormat, PageKey
from .private import create, make_folder, make_private

FORMAT_VERSION = 1
NAME_FILE = "tenant"
PLAIN = "t-"  # how the folder of a tenant begins
_MAGIC = b"ISTHMUSP"
_CHECKSUM, _LENGTH = slice(8, 24), slice(24, 28)

Parts = Sequence[bytes | memoryview]


class Places(Protocol):
    """Names and contents of files. Any thread may use one."""

    def folder_of(self, tenant: str) -> str:
        """The name of a tenant's folder in that of the store."""
        ...

    def name(self, key: PageKey, tenant: str, *, make: bool) -> str | None:
        """The path of a page's file in the store's folder; None where the tenant has no place, and none is made.

        OSError where a place cannot be made.
        """
        ...

    def content(self, form: PageFormat, key: PageKey, name: str, tenant: str, page: memoryview) -> Parts:
        """What the file of that name is to hold."""
        ...

    def parse(self, form: PageFormat, key: PageKey, name: str, tenant: str, content: bytes) -> memoryview | None:
        """The page in a file; None where the file is not exactly what it should be."""
        ...


class PlainPlaces:
    """Pages as they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder_of(self, tenant: str) -> str:
        return PLAIN + hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()

    def name(self, key: PageKey, tenant: str, *, make: bool) -> str | None:
        folder = self.folder_of(tenant)
        if make and not (self._folder / folder / NAME_FILE).exists():
            make_private(self._folder)
            make_folder(self._folder / folder)
            with suppress(FileExistsError), os.fdopen(create(self._folder / folder / NAME_FILE), "wb") as file:
                file.write(tenant.encode())
        digits = key.hash.hex()
        return os.path.join(folder, digits[:2], f"{digits}.{key.encoding}")

    def content(self, form: PageFormat, key: PageKey, name: str, tenant: str, page: memoryview) -> Parts:
        header = page_header(form, key)
        length = len(header).to_bytes(4, "little")
        hasher = xxhash.xxh3_128(length)
        hasher.update(header)
        hasher.update(page)
        return [_MAGIC, hasher.digest(), length, header, page]

    def parse(self, form: PageFormat, key: PageKey, name: str, tenant: str, content: bytes) -> memoryview | None:
        expected = page_header(form, key)
        start = _LENGTH.stop + len(expected)
        view = memoryview(content)
        whole = (
            content[:8] == _MAGIC
            and content[_LENGTH] == len(expected).to_bytes(4, "little")
            and content[_LENGTH.stop : start] == expected
            and len(content) == start + page_bytes(form, key)
            and xxhash.xxh3_128(view[_LENGTH.start :]).digest() == content[_CHECKSUM]
        )
        return view[start:] if whole else None


def page_header(form: PageFormat, key: PageKey) -> bytes:
    """What a page is, in bytes."""
    codec = form.codec
    fields = [
        *(FORMAT_VERSION, form.model_fingerprint, codec.name, codec.params_hash, form.page_tokens),
        *(key.hash, key.encoding, form.sizes(key.encoding, form.page_tokens)),
    ]
    packed = msgpack.packb(fields)
    assert packed is not None
    return packed


def page_bytes(form: PageFormat, key: PageKey) -> int:
    """Size of a full page."""
    return sum(form.sizes(key.encoding, form.page_tokens))
