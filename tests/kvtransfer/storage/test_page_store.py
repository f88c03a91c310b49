"""The store on disk: what comes back is what was written, and nothing that happens to the folder is an error."""

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.registry import build_codec
from isthmus.kvtransfer.encoded import EncodedPage, PageFormat
from isthmus.kvtransfer.storage.files import StoreFiles
from isthmus.kvtransfer.storage.store import PageStore

LAYERS = (LayerShape(kv_heads=2, head_dim=64),) * 2
MIB = 1 << 20


def make_format(**changes) -> PageFormat:
    settings = {"model_fingerprint": "m", "codec": build_codec("tq-k4v4", LAYERS, 64), "layers": LAYERS}
    return PageFormat(**{**settings, "page_tokens": 64, "dtype": torch.float32, **changes})


FORM = make_format()


def make_page(number: int, packed: bool = True) -> EncodedPage:
    page = FORM.blank(FORM.key(number.to_bytes(16, "big"), packed=packed), 64, packed=packed)
    page.data[:] = random.Random(number).randbytes(page.nbytes)
    return page


def written(folder: Path, *pages: EncodedPage, limit: int = 64 * MIB) -> PageStore:
    """A closed store that has written the pages."""
    store = PageStore(folder, limit)
    for page in pages:
        store.enqueue(FORM, page)
    store.close()
    return store


def read(store: PageStore, page: EncodedPage, form: PageFormat = FORM) -> bytes | None:
    assert page.key is not None
    found = store.read(form, page.key)
    return None if found is None else bytes(found.data)


def used_ago(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "tenant"))


def test_pages_come_back_after_a_restart(tmp_path):
    pages = [make_page(1), make_page(2, packed=False), make_page(2)]
    assert written(tmp_path, *pages).counters["store_writes"] == 3
    store = PageStore(tmp_path, 64 * MIB)
    assert [read(store, page) for page in pages] == [bytes(page.data) for page in pages]
    assert read(store, make_page(3)) is None
    assert (store.counters["store_hits"], store.counters["store_misses"]) == (3, 1)


def test_a_page_is_written_once(tmp_path):
    assert written(tmp_path, make_page(1)).counters["store_writes"] == 1
    assert written(tmp_path, make_page(1)).counters["store_writes"] == 0
    assert len(files(tmp_path)) == 1


def test_any_damage_is_a_counted_miss_and_the_file_goes(tmp_path):
    rng, page = random.Random(1), make_page(1)
    for _ in range(60):
        written(tmp_path, page)
        (path,) = files(tmp_path)
        data = bytearray(path.read_bytes())
        kind = rng.randrange(4)
        if kind == 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[rng.randrange(len(data)) :]
        elif kind == 2:
            data += b"x"
        else:
            data = bytearray(rng.randbytes(rng.randrange(200)))
        path.write_bytes(data)
        store = PageStore(tmp_path, 64 * MIB)
        assert read(store, page) is None
        assert store.counters["store_corrupt"] == 1
        assert files(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [
        {"model_fingerprint": "other"},
        {"codec": build_codec("tq-k4v4", LAYERS, 64, [torch.full((2, 64), 2.0)] * 2)},
        {"codec": build_codec("tq-k2v2", LAYERS, 64)},
        {"layers": LAYERS[:1]},
    ],
)
def test_a_page_of_anything_else_under_that_name_is_not_taken(tmp_path, other):
    page = make_page(1)
    written(tmp_path, page)
    assert read(PageStore(tmp_path, 64 * MIB), page, make_format(**other)) is None


def test_the_files_unused_for_longest_make_room(tmp_path):
    size = make_page(0).nbytes + 200
    written(tmp_path, *(make_page(number) for number in range(8)), limit=10 * size)
    for age, path in enumerate(files(tmp_path)):
        used_ago(path, 1000 - age)
    store = PageStore(tmp_path, 10 * size)
    assert read(store, make_page(0)) is not None, "used now, so no longer the oldest"
    for number in range(8, 12):
        store.enqueue(FORM, make_page(number))
    store.close()
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 10 * size
    here = [number for number in range(12) if read(store, make_page(number)) is not None]
    assert {0, 8, 9, 10, 11} <= set(here)
    assert 1 not in here
    assert store.counters["store_evicted"] >= 2


def test_what_a_killed_process_began_is_cleared_away(tmp_path):
    (tmp_path / "ab").mkdir()
    old, new = tmp_path / "ab" / "1-1.begun", tmp_path / "ab" / "1-2.begun"
    for path in (old, new):
        path.write_bytes(b"half")
    used_ago(old, 3600)
    written(tmp_path, make_page(1))
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_counted_and_said_once(tmp_path, monkeypatch, caplog, error):
    def refuse(self, name, parts):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(StoreFiles, "write", refuse)
    store = written(tmp_path, make_page(1), make_page(2), make_page(3))
    assert store.counters["store_write_errors"] == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert os.strerror(error) in caplog.text


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    store = written(blocked, make_page(1))
    assert read(store, make_page(1)) is None
    assert store.counters["store_write_errors"] == 1


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def half(descriptor, data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", half)
    assert written(tmp_path, make_page(1)).counters["store_write_errors"] == 1
    assert files(tmp_path) == []


def test_pages_are_dropped_where_the_disk_is_too_slow(tmp_path, monkeypatch):
    monkeypatch.setattr("isthmus.kvtransfer.storage.store.QUEUE_BYTES", 2 * make_page(0).nbytes)
    monkeypatch.setattr(StoreFiles, "touch", lambda self, name: time.sleep(0.2) or True)
    store = written(tmp_path, *(make_page(number) for number in range(5)))
    assert store.counters["store_dropped"] == 3


_WRITER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_page_store as t
folder, first = Path(sys.argv[1]), int(sys.argv[2])
store = t.PageStore(folder, int(sys.argv[3]))
for number in range(first, first + 60):
    store.enqueue(t.FORM, t.make_page(number))
    found = t.read(store, t.make_page(number - 5))
    assert found is None or found == bytes(t.make_page(number - 5).data)
store.close(60)
assert not store.counters["store_write_errors"] and not store.counters["store_corrupt"], store.counters
"""


def test_several_processes_share_a_folder(tmp_path):
    """They write the same and other pages, evict all the time, and never see anything that is not a whole page."""
    limit = 30 * (make_page(0).nbytes + 200)
    code = _WRITER.format(tests=str(Path(__file__).parent))
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(first), str(limit)]) for first in (10, 30, 50)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    store = PageStore(tmp_path, limit)
    found = [read(store, make_page(number)) for number in range(120)]
    assert not store.counters["store_corrupt"]
    assert sum(content is not None for content in found) >= 20
