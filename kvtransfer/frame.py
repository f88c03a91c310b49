"""Frames of the KV stream: a msgpack header that binds the bytes to what they are for, and the bytes.

Header (msgpack array, in this order):

    protocol version, request id, attempt, model fingerprint, codec, codec parameter hash, prompt hash,
    index of the frame, sections: [layer, first head, end head, start token, tokens, encoding, bytes] each

The payload holds the sections one after the other. A packed section is the codec's pages ([pages, page_bytes], see
`docs/codec.md`); a raw one is [KV heads, 2 (keys, values), tokens, D] in `bf16` or `f32`, little-endian. The frame's
checksum (xxh3-64) covers header and payload, the commit's digest (xxh3-128) all checksums in order.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Self

import msgpack
import xxhash

from ..proto.errors import Corrupt
from ..proto.prefill_pb2 import FirstToken, KvCommit, KvFrame, PromptLogprobs

PROTOCOL_VERSION = 3

MIN_FRAME_BYTES = 256 << 10  # many small messages kill throughput
MAX_FRAME_BYTES = 4 << 20
MAX_SCORED_TOKENS = 512  # of a prompt, in one message of log-probabilities

PACKED, BF16, F32 = "packed", "bf16", "f32"
RAW_BYTES = {BF16: 2, F32: 4}  # per value


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What a transfer is for. Both sides build it on their own; every frame must carry the same."""

    request_id: str
    attempt: int
    model_fingerprint: str
    codec: str
    codec_hash: str
    prompt_hash: bytes
    protocol_version: int = PROTOCOL_VERSION

    def fields(self) -> list[Any]:
        """The first seven entries of a header."""
        return [
            *(self.protocol_version, self.request_id, self.attempt, self.model_fingerprint),
            *(self.codec, self.codec_hash, self.prompt_hash),
        ]


@dataclass(frozen=True)
class SectionHeader:
    """One section of a payload: tokens [start, start + tokens) of KV heads [first_head, end_head) of one layer."""

    layer: int
    first_head: int
    end_head: int
    start: int
    tokens: int
    encoding: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class FrameHeader:
    """Everything in a frame but the bytes."""

    binding: list[Any]
    index: int
    sections: tuple[SectionHeader, ...]

    def pack(self) -> bytes:
        """The header as msgpack."""
        sections = [list(astuple(section)) for section in self.sections]
        packed = msgpack.packb([*self.binding, self.index, sections])
        assert packed is not None
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """Reads a header; Corrupt where it is not one. The values are not checked against anything yet."""
        try:
            *binding, index, sections = msgpack.unpackb(packed)
            parsed = tuple(SectionHeader(*section) for section in sections)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise Corrupt(f"a frame header cannot be read: {error}") from error
        numbers = [index]
        for s in parsed:
            numbers += [s.layer, s.first_head, s.end_head, s.start, s.tokens, s.nbytes]
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise Corrupt("a frame header has a value of the wrong type")
        return cls(binding=binding, index=index, sections=parsed)


class Digest:
    """Counts and digests frames in order; sender and receiver each keep one and compare them at the commit."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.frames = 0
        self.payload_bytes = 0
        self.wire_bytes = 0

    def add(self, frame: KvFrame) -> None:
        self._hash.update(frame.checksum.to_bytes(8, "little"))
        self.frames += 1
        self.payload_bytes += len(frame.payload)
        self.wire_bytes += frame.ByteSize()

    def digest(self) -> bytes:
        """16 bytes over all frames so far."""
        return self._hash.digest()


def frame_checksum(header: bytes, payload: bytes) -> int:
    """xxh3-64 of header and payload."""
    hasher = xxhash.xxh3_64(header)
    hasher.update(payload)
    return hasher.intdigest()


def first_token_checksum(binding: Binding, first: FirstToken) -> int:
    """xxh3-64 of what a transfer is for and of its first token, which is used before the commit covers anything."""
    bare = FirstToken()
    bare.CopyFrom(first)
    bare.checksum = 0
    return _bound_checksum(binding.fields(), bare.SerializeToString(deterministic=True))


def prompt_logprobs_checksum(binding: Binding, scored: PromptLogprobs) -> int:
    """The same of log-probabilities of its prompt."""
    bare = PromptLogprobs()
    bare.CopyFrom(scored)
    bare.checksum = 0
    return _bound_checksum([*binding.fields(), "prompt log-probabilities"], bare.SerializeToString(deterministic=True))


def _bound_checksum(binding: list[Any], message: bytes) -> int:
    packed = msgpack.packb(binding)
    assert packed is not None
    return xxhash.xxh3_64_intdigest(packed + message)


class FrameWriter:
    """Collects encoded sections of one transfer into frames of a good size."""

    def __init__(self, binding: Binding, *, min_bytes: int = MIN_FRAME_BYTES) -> None:
        self._binding = binding.fields()
        self._min_bytes = min_bytes
        self._sections: list[SectionHeader] = []
        self._parts: list[memoryview] = []
        self._bytes = 0
        self.digest = Digest()

    def add(self, section: SectionHeader, parts: Sequence[memoryview]) -> list[KvFrame]:
        """Takes one section; returns the frames that are full now. Its bytes must not change until they are in one."""
        frames = self.flush() if self._bytes + section.nbytes > MAX_FRAME_BYTES else []
        self._sections.append(section)
        self._parts += parts
        self._bytes += section.nbytes
        return [*frames, *self.flush()] if self._bytes >= self._min_bytes else frames

    def flush(self) -> list[KvFrame]:
        """The frame of what is collected so far; none where that is nothing."""
        if not self._sections:
            return []
        header = FrameHeader(
            binding=self._binding,
            index=self.digest.frames,
            sections=tuple(self._sections),
        ).pack()
        payload = b"".join(self._parts)
        frame = KvFrame(header=header, payload=payload, checksum=frame_checksum(header, payload))
        self.digest.add(frame)
        self._sections, self._parts, self._bytes = [], [], 0
        return [frame]

    def commit(self) -> KvCommit:
        """The closing message for all frames so far, with no statistics yet."""
        digest = self.digest
        return KvCommit(frames=digest.frames, payload_bytes=digest.payload_bytes, digest=digest.digest())
