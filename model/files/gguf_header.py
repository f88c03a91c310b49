"""The header of a GGUF file, checked before a library reads it: counts, lengths, and where its tensors lie.

    "GGUF" | version (4) | tensors (8) | metadata (8) | key, type, value of each | name, shape, type, offset of each
    tensor | padding | the tensors

Nothing is allocated by what the file says; what it says is compared with the bytes that are there.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
from pathlib import Path

from ...proto.errors import InvalidRequest

MAX_METADATA, MAX_TENSORS = 1 << 16, 1 << 17
MAX_KEY, MAX_TEXT = 1 << 16, 64 << 20  # bytes of a key, and of a value that is text
MAX_ITEMS = 4 << 20  # of all arrays together; the largest vocabularies have under a million tokens
MAX_DIMENSIONS, MAX_ALIGNMENT = 8, 1 << 20
_MOST = {"block_count": 4096, "context_length": 1 << 28, "embedding_length": 1 << 20, "expert_count": 1 << 14}
_MOST |= {"attention.head_count": 1 << 14, "feed_forward_length": 1 << 22, "vocab_size": 1 << 24}

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of types that are numbers
_WHOLE = (0, 2, 4, 10)  # those without a sign
_TEXT, _ARRAY = 8, 9


def check_gguf(path: Path) -> int:
    """How many tensors a file has; InvalidRequest where it is not GGUF, or says what it cannot hold."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidRequest(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(path, content).check()


class _Header:
    """A header as far as it is read."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._size = path, content, len(content)
        self._at = 4
        self._items = 0
        self._alignment = 32

    def check(self) -> int:
        version = self._number(4)
        if version not in (2, 3):
            raise self._wrong(f"version {version}; allowed: 2, 3")
        tensors, metadata = self._number(8), self._number(8)
        self._allow(tensors, MAX_TENSORS, 24, "tensors")
        self._allow(metadata, MAX_METADATA, 13, "entries of metadata")
        keys = {self._entry() for _ in range(metadata)}
        if len(keys) < metadata:
            raise self._wrong("a key of its metadata occurs twice")
        sizes = [self._tensor() for _ in range(tensors)]
        if len({name for name, _, _ in sizes}) < tensors:
            raise self._wrong("a tensor's name occurs twice")
        room = self._size - -(-self._at // self._alignment) * self._alignment
        for name, offset, size in sizes:
            if offset % self._alignment or offset + size > room:
                raise self._wrong(f"tensor {name[:100]!r} lies at {offset} with {size} bytes, and there are {room}")
        if sum(size for _, _, size in sizes) > room:
            raise self._wrong("its tensors overlap")
        return tensors

    def _entry(self) -> bytes:
        key = self._text(MAX_KEY)
        kind = self._number(4)
        begin = self._at
        self._value(kind)
        if kind in _WHOLE:
            value = int.from_bytes(self._content[begin : self._at], "little")
            self._check_number(key.decode("utf-8", "replace"), value)
        return key

    def _check_number(self, key: str, value: int) -> None:
        if key == "general.alignment":
            if value & (value - 1) or not 1 <= value <= MAX_ALIGNMENT:
                raise self._wrong(f"an alignment of {value}")
            self._alignment = value
        most = _MOST.get(key.partition(".")[2])
        if most is not None and value > most:
            raise self._wrong(f"{key[:100]} is {value}; allowed: at most {most}")

    def _value(self, kind: int) -> None:
        if kind == _TEXT:
            self._text(MAX_TEXT)
        elif kind == _ARRAY:
            self._array()
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise self._wrong(f"a value of type {kind}")

    def _array(self) -> None:
        kind, count = self._number(4), self._number(8)
        if kind != _TEXT and kind not in _SIZES:
            raise self._wrong(f"an array of type {kind}")
        self._allow(count, MAX_ITEMS - self._items, 8 if kind == _TEXT else _SIZES[kind], "entries of arrays more")
        self._items += count
        if kind == _TEXT:
            for _ in range(count):
                self._text(MAX_TEXT)
        else:
            self._skip(count * _SIZES[kind])

    def _tensor(self) -> tuple[bytes, int, int]:
        """Name, offset and bytes of a tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text(MAX_KEY)
        dimensions = self._number(4)
        if dimensions > MAX_DIMENSIONS:
            raise self._wrong(f"a tensor of {dimensions} dimensions; allowed: at most {MAX_DIMENSIONS}")
        shape = [self._number(8) for _ in range(dimensions)]
        kind, offset = self._number(4), self._number(8)
        try:
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise self._wrong(f"a tensor of type {kind}") from None
        count = 1
        for length in shape:
            count *= length
        if count % block:
            raise self._wrong(f"tensor {name[:100]!r} of shape {shape} is not of whole blocks of {block}")
        return name, offset, count // block * nbytes

    def _text(self, most: int) -> bytes:
        length = self._number(8)
        self._allow(length, most, 1, "bytes of a text")
        self._at += length
        return self._content[self._at - length : self._at] if length <= MAX_KEY else b""

    def _number(self, size: int) -> int:
        self._skip(size)
        return int.from_bytes(self._content[self._at - size : self._at], "little")

    def _skip(self, size: int) -> None:
        if size > self._size - self._at:
            raise self._wrong("it ends within its header")
        self._at += size

    def _allow(self, count: int, most: int, each: int, what: str) -> None:
        """Refuses a count of things of `each` bytes or more that is over the bound, or that the file cannot hold."""
        room = (self._size - self._at) // each
        if count > min(most, room):
            raise self._wrong(f"{count} {what}; allowed: at most {min(most, room)}")

    def _wrong(self, reason: str) -> InvalidRequest:
        return InvalidRequest(f"{self._path} is no GGUF file that can be read: {reason}")
