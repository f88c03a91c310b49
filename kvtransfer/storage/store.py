"""The page store: encoded pages in files of a folder, by content. Survives restarts; many workers may share it.

A page has a file of its own, in the folder of its tenant (`places.py`); with a secret its content is encrypted
(`sealed.py`). Its hash covers model, codec, tenant and tokens (`kvtransfer/hashing.py`), so that a file is never
changed, only made and removed.

A file is written beside its place and renamed: what is there under its name is whole, as long as the machine does
not lose power. It is not synced to the disk: after a loss of power a file may be torn, and the checksum says so.
Whatever is wrong with a file, it is a miss, and is removed; whatever is wrong with the folder, requests go on.
"""

import logging
import threading
from collections import Counter
from pathlib import Path

from ...proto.errors import InvalidRequest
from ..encoded import EncodedPage, PageFormat, PageKey
from .files import StoreFiles
from .places import Places, PlainPlaces
from .private import make_private
from .sealed import SEALED, SealedPlaces

log = logging.getLogger(__name__)

QUEUE_BYTES = 256 << 20  # not yet written; pages that come on top are dropped


class PageStore:
    """Reads pages at once and writes them in a thread of its own. Any thread may use it; no method raises."""

    def __init__(self, folder: Path, limit_bytes: int, secret: bytes | None = None) -> None:
        """`secret`: pages are encrypted with keys that come from it. InvalidRequest for a folder open to others."""
        make_private(folder)
        self._files = StoreFiles(folder, limit_bytes)
        self._places: Places = PlainPlaces(folder) if secret is None else SealedPlaces(folder, secret)
        self._is_sealed = secret is not None
        self._queue: dict[PageKey, tuple[PageFormat, EncodedPage, str]] = {}  # in the order of `enqueue`
        self._queued_bytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self._complained: set[str] = set()
        self.counters: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._write_queued, name="page-store", daemon=True)
        self._thread.start()

    def read(self, form: PageFormat, key: PageKey, tenant: str = "") -> EncodedPage | None:
        """A tenant's page of that content, where a whole file of it is there."""
        name, content = None, None
        try:
            if (name := self._places.name(key, tenant, make=False)) is not None:
                content = self._files.read(name)
        except OSError as error:
            self._complain("read", error)
        if name is None or content is None:
            self.counters["store_misses"] += 1
            return None
        data = self._places.parse(form, key, name, tenant, content)
        if data is None:
            self.counters["store_corrupt"] += 1
            self._files.remove(name)
            log.warning("a damaged page was removed from the store", extra={"fields": {"file": name}})
            return None
        self._files.touch(name)
        self.counters["store_hits"] += 1
        return form.page(key, key.encoding, form.page_tokens, data)

    def enqueue(self, form: PageFormat, page: EncodedPage, tenant: str = "") -> None:
        """Has a tenant's full page written, or a use of it counted where its file is there; drops it where too many
        wait."""
        assert page.key is not None, "a page that is not full has no address"
        with self._wake:
            if page.key in self._queue or self._closing:
                return
            if self._queued_bytes + page.nbytes > QUEUE_BYTES:
                self.counters["store_dropped"] += 1
                return
            self._queue[page.key] = (form, page, tenant)
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
        if self._is_sealed:
            self._remove_plain()
        while True:
            with self._wake:
                while not self._queue and not self._closing:
                    self._wake.wait()
                if not self._queue:
                    return
                key = next(iter(self._queue))
                form, page, tenant = self._queue[key]
            try:
                self._write(form, key, page, tenant)
            except (OSError, InvalidRequest) as error:
                self.counters["store_write_errors"] += 1
                self._complain("write", error)
            except Exception:  # a bug: the thread goes on with the next page
                self.counters["store_write_errors"] += 1
                log.exception("a page could not be written to the store")
            self.counters["store_evicted"] = self._files.evicted
            with self._wake:
                del self._queue[key]
                self._queued_bytes -= page.nbytes

    def _write(self, form: PageFormat, key: PageKey, page: EncodedPage, tenant: str) -> None:
        name = self._places.name(key, tenant, make=True)
        if name is None:
            raise OSError("no place for the tenant's pages")
        if not self._files.touch(name):
            self._files.write(name, self._places.content(form, key, name, tenant, page.data))
            self.counters["store_writes"] += 1

    def _remove_plain(self) -> None:
        """Pages that were written before there was a secret: nobody reads them any more."""
        try:
            removed = self._files.remove_others(SEALED)
        except OSError as error:
            return self._complain("remove pages that are not encrypted", error)
        if removed:
            log.warning("%d files of pages that were not encrypted were removed from the store", removed)
        return None

    def _complain(self, what: str, error: OSError | InvalidRequest) -> None:
        """Logs an error of the folder, once for each kind."""
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        if (kind := f"{what} {reason}") not in self._complained:
            self._complained.add(kind)
            log.warning("the page store cannot %s: %s; it goes on without", what, reason)
