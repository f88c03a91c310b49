"""The page store: encoded pages in files of a folder, by content. Survives restarts; many workers may share it.

A page lies in `FOLDER/ab/abcd….ENCODING`, where `abcd…` is its hash. The hash covers model, codec, tenant and tokens
(`kvtransfer/hashing.py`), so that a file is never changed, only made and removed. The file:

    magic (8) | checksum (16) | header length (4) | header | page

The checksum is xxh3-128 of everything after it. The header is msgpack: format version, model fingerprint, codec,
codec parameter hash, page size, page hash, encoding, bytes of each layer. The page is in the wire layout.

A file is written beside its place and renamed: what is there under its name is whole, as long as the machine does
not lose power. It is not synced to the disk: after a loss of power a file may be torn, and the checksum says so.
Whatever is wrong with a file, it is a miss, and is removed; whatever is wrong with the folder, requests go on.
"""

import logging
import os
import threading
from collections import Counter
from pathlib import Path

import msgpack
import xxhash

from ..encoded import EncodedPage, PageFormat, PageKey
from .files import StoreFiles

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_MAGIC = b"ISTHMUSP"
_CHECKSUM, _LENGTH = slice(8, 24), slice(24, 28)
QUEUE_BYTES = 256 << 20  # not yet written; pages that come on top are dropped


class PageStore:
    """Reads pages at once and writes them in a thread of its own. Any thread may use it; no method raises."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._files = StoreFiles(folder, limit_bytes)
        self._queue: dict[PageKey, tuple[PageFormat, EncodedPage]] = {}  # in the order of `enqueue`
        self._queued_bytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self._complained: set[str] = set()
        self.counters: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._write_queued, name="page-store", daemon=True)
        self._thread.start()

    def read(self, form: PageFormat, key: PageKey) -> EncodedPage | None:
        """The page of that content, where a whole file of it is there."""
        name = _name(key)
        try:
            content = self._files.read(name)
        except OSError as error:
            self._complain("read", error)
            content = None
        if content is None:
            self.counters["store_misses"] += 1
            return None
        page = _parse(form, key, content)
        if page is None:
            self.counters["store_corrupt"] += 1
            self._files.remove(name)
            log.warning("a damaged page was removed from the store", extra={"fields": {"file": name}})
            return None
        self._files.touch(name)
        self.counters["store_hits"] += 1
        return page

    def enqueue(self, form: PageFormat, page: EncodedPage) -> None:
        """Has a full page written, or a use of it counted where its file is there; drops it where too many wait."""
        assert page.key is not None, "a page that is not full has no address"
        with self._wake:
            if page.key in self._queue or self._closing:
                return
            if self._queued_bytes + page.nbytes > QUEUE_BYTES:
                self.counters["store_dropped"] += 1
                return
            self._queue[page.key] = (form, page)
            self._queued_bytes += page.nbytes
            self._wake.notify()

    @property
    def queued_bytes(self) -> int:
        """Of pages that are not yet written."""
        return self._queued_bytes

    def close(self, timeout_s: float = 10.0) -> None:
        """Writes what waits, as far as the time allows."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _write_queued(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closing:
                    self._wake.wait()
                if not self._queue:
                    return
                key = next(iter(self._queue))
                form, page = self._queue[key]
            try:
                if not self._files.touch(_name(key)):
                    self._files.write(_name(key), _content(form, page))
                    self.counters["store_writes"] += 1
            except OSError as error:
                self.counters["store_write_errors"] += 1
                self._complain("write", error)
            except Exception:  # a bug: the thread goes on with the next page
                self.counters["store_write_errors"] += 1
                log.exception("a page could not be written to the store")
            self.counters["store_evicted"] = self._files.evicted
            with self._wake:
                del self._queue[key]
                self._queued_bytes -= page.nbytes

    def _complain(self, what: str, error: OSError) -> None:
        """Logs an error of the folder, once for each kind."""
        kind = f"{what} {error.errno}"
        if kind not in self._complained:
            self._complained.add(kind)
            reason = error.strerror or type(error).__name__
            log.warning("the page store cannot %s: %s; it goes on without", what, reason)


def _name(key: PageKey) -> str:
    digits = key.hash.hex()
    return os.path.join(digits[:2], f"{digits}.{key.encoding}")


def _header(form: PageFormat, key: PageKey) -> bytes:
    codec = form.codec
    fields = [
        *(FORMAT_VERSION, form.model_fingerprint, codec.name, codec.params_hash, form.page_tokens),
        *(key.hash, key.encoding, form.sizes(key.encoding, form.page_tokens)),
    ]
    packed = msgpack.packb(fields)
    assert packed is not None
    return packed


def _content(form: PageFormat, page: EncodedPage) -> list[bytes | memoryview]:
    """The parts of a file."""
    assert page.key is not None
    header = _header(form, page.key)
    length = len(header).to_bytes(4, "little")
    hasher = xxhash.xxh3_128(length)
    hasher.update(header)
    hasher.update(page.data)
    return [_MAGIC, hasher.digest(), length, header, page.data]


def _parse(form: PageFormat, key: PageKey, content: bytes) -> EncodedPage | None:
    """The page in a file; None where the file is not exactly what it should be."""
    expected = _header(form, key)
    start = _LENGTH.stop + len(expected)
    view = memoryview(content)
    whole = (
        content[:8] == _MAGIC
        and content[_LENGTH] == len(expected).to_bytes(4, "little")
        and content[_LENGTH.stop : start] == expected
        and len(content) == start + sum(form.sizes(key.encoding, form.page_tokens))
        and xxhash.xxh3_128(view[_LENGTH.start :]).digest() == content[_CHECKSUM]
    )
    return form.page(key, key.encoding, form.page_tokens, view[start:]) if whole else None
