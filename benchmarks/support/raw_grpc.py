"""A gRPC call as bytes on a socket: what no well-behaved client library would send.

HTTP/2 as far as one call needs it: literal headers without Huffman codes, no flow control beyond the first window.
"""

import asyncio
import re
import ssl
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 1, 1, 4, 8, 32
MAX_FRAME = 16_384  # bytes of a frame's payload, where the other side has allowed no more
_STATUS = re.compile(rb"grpc-status[\x01\x02]([0-9]{1,2})")  # in full, for it is the first one of its connection

Headers = Sequence[tuple[bytes, bytes]]


@dataclass
class RawAnswer:
    """What came back: messages, the status where one was told, and how the other side ended the stream."""

    status: int | None = None
    messages: list[bytes] = field(default_factory=list)
    ended: bool = False
    reset: bool = False


async def connect(address: str, tls: ssl.SSLContext | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to "host:port" or "unix:PATH"; inside TLS where a context is given, which must offer h2."""
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port), ssl=tls)


async def raw_call(
    address: str,
    path: str,
    message: bytes,
    headers: Headers = (),
    *,
    within_s: float = 20,
    tls: ssl.SSLContext | None = None,
) -> RawAnswer:
    """One call with the given extra headers; TimeoutError where it does not end `within_s`."""
    async with asyncio.timeout(within_s):
        reader, writer = await connect(address, tls)
        try:
            writer.write(opening() + b"".join(request_frames(1, path, message, headers)))
            return await read_answer(reader, writer)
        finally:
            writer.close()


async def read_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> RawAnswer:
    """The answer to the only stream of a connection."""
    answer, received = RawAnswer(), b""
    while not answer.ended:
        head = await reader.readexactly(9)
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        payload = await reader.readexactly(length)
        if kind == SETTINGS and not flags & ACK:
            writer.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            writer.write(frame(PING, ACK, 0, payload))
        elif kind == DATA:
            received += payload
        elif kind == HEADERS and (told := _STATUS.search(payload)):
            answer.status = int(told[1])
        elif kind in (RST_STREAM, GOAWAY):
            answer.ended = answer.reset = True
        if kind in (DATA, HEADERS) and flags & END_STREAM:
            answer.ended = True
    while len(received) >= 5:
        end = 5 + int.from_bytes(received[1:5], "big")
        answer.messages.append(received[5:end])
        received = received[end:]
    return answer


def opening() -> bytes:
    """What a client sends first."""
    return PREFACE + frame(SETTINGS, 0, 0, b"")


def request_frames(
    stream: int, path: str, message: bytes, headers: Headers = (), *, compressed: int = 0
) -> list[bytes]:
    """A call with one message, `compressed` as its flag says, as frames."""
    block = call_headers(path, headers)
    body = prefixed(message, compressed)
    pieces = [body[at : at + MAX_FRAME] for at in range(0, len(body), MAX_FRAME)]
    ends = [0] * (len(pieces) - 1) + [END_STREAM]
    data = [frame(DATA, end, stream, piece) for piece, end in zip(pieces, ends, strict=True)]
    return [*header_frames(stream, block), *data]


def header_frames(stream: int, block: bytes) -> list[bytes]:
    """A block of headers as HEADERS and as many CONTINUATIONs as it needs."""
    pieces = [block[at : at + MAX_FRAME] for at in range(0, len(block), MAX_FRAME)] or [b""]
    frames = [frame(HEADERS if not at else CONTINUATION, 0, stream, piece) for at, piece in enumerate(pieces[:-1])]
    return [*frames, frame(CONTINUATION if frames else HEADERS, END_HEADERS, stream, pieces[-1])]


def call_headers(path: str, headers: Headers = ()) -> bytes:
    """The block of headers of a call."""
    known = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
    return b"".join(literal(name, value) for name, value in (*known, *headers))


def prefixed(message: bytes, compressed: int = 0) -> bytes:
    """A message with gRPC's prefix."""
    return bytes((compressed,)) + struct.pack(">I", len(message)) + message


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def settings(pairs: Sequence[tuple[int, int]]) -> bytes:
    """A SETTINGS frame of identifiers and values."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", name, value) for name, value in pairs))


def literal(name: bytes, value: bytes) -> bytes:
    """A header that is never indexed (RFC 7541, 6.2.3)."""
    return b"\x10" + _string(name) + _string(value)


def indexed_literal(name: bytes, value: bytes) -> bytes:
    """A header that is put into the dynamic table (RFC 7541, 6.2.1)."""
    return b"\x40" + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),)) + text
    rest, encoded = len(text) - 127, bytearray((127,))
    while rest >= 128:
        encoded.append(rest % 128 + 128)
        rest //= 128
    return bytes((*encoded, rest)) + text
