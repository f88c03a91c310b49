"""Headers of GGUF files: real ones pass; ones that lie are refused at once, with nothing allocated."""

import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from isthmus.model.files.gguf_header import check_gguf
from isthmus.model.load.packages import gguf_of
from isthmus.model.load.sources import locate
from isthmus.proto.errors import InvalidRequest


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: bytes = b"w", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def header(*parts: bytes, tensors: int = 0, metadata: int = 0, version: int = 3, data: int = 0) -> bytes:
    begun = b"GGUF" + struct.pack("<IQQ", version, tensors, metadata) + b"".join(parts)
    return begun + bytes(-len(begun) % 32 + data)


REFUSED = {
    "2^60 tensors": (header(tensors=1 << 60), "1152921504606846976 tensors"),
    "2^60 entries": (header(metadata=1 << 60), "1152921504606846976 entries of metadata"),
    "more tensors than bytes": (header(tensor(), tensors=1000), "1000 tensors"),
    "an old version": (header(version=1), "version 1"),
    "another byte order": (header(version=3 << 24), "version 50331648"),
    "cut short": (header()[:20], "it ends within its header"),
    "a long key": (header(text(b"a", 1 << 62), bytes(64), metadata=1), "4611686018427387904 bytes of a text"),
    "a long text": (header(entry(b"a", 8, text(b"x", 1 << 40)), metadata=1), "1099511627776 bytes of a text"),
    "an array without end": (header(entry(b"a", 9, array(4, 1 << 61)), metadata=1), "2305843009213693952 entries of"),
    "an array of texts": (header(entry(b"a", 9, array(8, 1 << 40)), metadata=1), "1099511627776 entries of arrays"),
    "an array of arrays": (header(entry(b"a", 9, array(9, 1)), bytes(64), metadata=1), "an array of type 9"),
    "an unknown type": (header(entry(b"a", 99, bytes(8)), metadata=1), "a value of type 99"),
    "a key twice": (header(entry(b"a", 0, b"x"), entry(b"a", 0, b"y"), metadata=2), "occurs twice"),
    "a tensor twice": (header(tensor(), tensor(), tensors=2, data=64), "a tensor's name occurs twice"),
    "a tensor without end": (header(tensor(shape=(1 << 62, 1 << 62)), tensors=1, data=64), "lies at 0 with"),
    "a tensor past the end": (header(tensor(offset=1 << 40), tensors=1, data=64), "lies at 1099511627776"),
    "a tensor between": (header(tensor(offset=4), tensors=1, data=64), "lies at 4 with"),
    "overlaps": (
        header(*(tensor(b"%d" % n, (16,)) for n in range(8)), tensors=8, data=64),
        "its tensors overlap",
    ),
    "many dimensions": (header(tensor(shape=(1,) * 9), tensors=1, data=64), "a tensor of 9 dimensions"),
    "4 billion dimensions": (header(text(b"w"), struct.pack("<I", 0xFFFFFFFF), bytes(64), tensors=1), "4294967295 dim"),
    "an unknown tensor type": (header(tensor(kind=99), tensors=1, data=64), "a tensor of type 99"),
    "half a block": (header(tensor(shape=(33,), kind=2), tensors=1, data=64), "not of whole blocks of 32"),
    "an alignment of 0": (header(entry(b"general.alignment", 4, bytes(4)), metadata=1), "an alignment of 0"),
    "an alignment of 3": (header(entry(b"general.alignment", 4, b"\3\0\0\0"), metadata=1), "an alignment of 3"),
    "many layers": (header(entry(b"llama.block_count", 4, b"\xff" * 4), metadata=1), "block_count is 4294967295"),
    "a long context": (header(entry(b"llama.context_length", 10, b"\xff" * 8), metadata=1), "context_length is 1844"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_header_that_lies_is_refused_at_once(tmp_path: Path, case: str) -> None:
    content, reason = REFUSED[case]
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    check_gguf.__globals__["mmap"]  # imported, as gguf is below: neither is counted
    tracemalloc.start()
    began = time.thread_time()
    with pytest.raises(InvalidRequest, match=reason):
        check_gguf(file)
    seconds, (_, peak) = time.thread_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.1
    assert peak < 1 << 20
    with pytest.raises(InvalidRequest, match=reason):
        locate(str(file))


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GG")
    with pytest.raises(InvalidRequest, match="is not a GGUF file"):
        check_gguf(tmp_path / "x.gguf")


def test_what_the_library_writes_passes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.5, 1.0, 2.0])
    writer.add_tensor("a", np.zeros((4, 32), dtype=np.float32))
    writer.add_tensor("b", np.zeros((3, 18), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(tmp_path / "x.gguf") == 2
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 64)
    with pytest.raises(InvalidRequest, match="lies at"):
        check_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(("name", "tensors"), [("smollm2-135m", 272), ("gemma3-270m", 236)])
def test_real_files_pass(name: str, tensors: int) -> None:
    assert check_gguf(gguf_of(name)) == tensors


def test_the_check_needs_no_torch() -> None:
    code = "import sys, isthmus.model.load.sources, isthmus.model.files.gguf_header; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
