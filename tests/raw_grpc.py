"""A gRPC call as bytes on a socket: what no well-behaved client library would send.

HTTP/2 as far as one call needs it: literal headers without Huffman codes, no flow control beyond the first window.
"""

import asyncio
import re
import struct
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
_STATUS = re.compile(rb"grpc-status[\x01\x02]([0-9]{1,2})")  # in full, for it is the first one of its connection


@dataclass
class RawAnswer:
    """What came back: messages, the status where one was told, and how the other side ended the stream."""

    status: int | None = None
    messages: list[bytes] = field(default_factory=list)
    ended: bool = False
    reset: bool = False


async def raw_call(
    address: str, path: str, message: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), *, within_s: float = 20
) -> RawAnswer:
    """One call with the given extra headers; TimeoutError where it does not end `within_s`."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(within_s):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            known = (
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", path.encode()),
                (b":authority", address.encode()),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
            )
            block = b"".join(_literal(name, value) for name, value in (*known, *headers))
            body = b"\0" + struct.pack(">I", len(message)) + message
            writer.write(PREFACE + _frame(SETTINGS, 0, 0, b"") + _frame(HEADERS, END_HEADERS, 1, block))
            writer.write(_frame(DATA, END_STREAM, 1, body))
            return await _answer(reader, writer)
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> RawAnswer:
    answer, received = RawAnswer(), b""
    while not answer.ended:
        head = await reader.readexactly(9)
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        payload = await reader.readexactly(length)
        if kind == SETTINGS and not flags & ACK:
            writer.write(_frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            writer.write(_frame(PING, ACK, 0, payload))
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


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that is never indexed (RFC 7541, 6.2.3)."""
    return b"\x10" + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),)) + text
    rest, encoded = len(text) - 127, bytearray((127,))
    while rest >= 128:
        encoded.append(rest % 128 + 128)
        rest //= 128
    return bytes((*encoded, rest)) + text
