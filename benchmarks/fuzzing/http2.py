"""Bytes for a port: noise, and HTTP/2 that begins as a client of gRPC does and goes wrong in one way or another."""

import gzip
import random
import struct
from collections.abc import Callable

from support import raw_grpc as h2

Draw = random.Random
Maker = Callable[[Draw, str, bytes], bytes]  # of a random generator, a method's path and a request
MANY = (3, 40, 400, 2000)
NUMBERS = (0, 1, 2, 3, 100, 16_383, 16_384, 16_385, (1 << 24) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LARGEST = 2 << 20  # bytes of one input


def noise(rng: Draw, path: str, message: bytes) -> bytes:
    """Bytes of anything."""
    return rng.randbytes(rng.choice((0, 1, 9, 24, 100, 5000, 200_000)))


def http1(rng: Draw, path: str, message: bytes) -> bytes:
    """A request of HTTP/1, perhaps for an upgrade."""
    upgrade = rng.choice(
        (b"", b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n", b"X: " + b"y" * 100_000)
    )
    return (
        rng.choice((b"GET", b"POST", b"PRI")) + b" " + path.encode() + b" HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n"
    )


def tls(rng: Draw, path: str, message: bytes) -> bytes:
    """Records of TLS: a hello that is none, of any length."""
    body = rng.randbytes(rng.choice((0, 5, 200, 16_000)))
    kind, version = rng.choice((20, 21, 22, 23, 255)), rng.choice((b"\3\1", b"\3\3", b"\3\4", b"\0\0"))
    return bytes((kind,)) + version + struct.pack(">H", rng.choice((len(body), 0, 0xFFFF, 3))) + body


def preface(rng: Draw, path: str, message: bytes) -> bytes:
    """The preface, cut, doubled or followed by noise."""
    return h2.PREFACE[: rng.randrange(25)] + rng.choice((b"", h2.PREFACE, rng.randbytes(300)))


RAW: dict[str, Maker] = {make.__name__: make for make in (noise, http1, tls, preface)}


def _frames(rng: Draw, path: str, message: bytes) -> list[bytes]:
    headers = rng.choice(((), ((b"grpc-timeout", b"1S"),), ((b"grpc-timeout", b"1n"),)))
    return h2.request_frames(1, path, message[:60_000], headers)


def damaged(rng: Draw, path: str, message: bytes) -> bytes:
    """A good call with bits flipped, pieces cut out, repeated or put in."""
    data = bytearray(h2.opening() + b"".join(_frames(rng, path, message)))
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(24, len(data)) if len(data) > 25 else 0
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 40))
        else:
            data += data[at : at + rng.randint(1, 400)]
    return bytes(data)


def shuffled(rng: Draw, path: str, message: bytes) -> bytes:
    """The frames of two calls in any order, some lost, some doubled."""
    frames = [*_frames(rng, path, message), *h2.request_frames(3, path, message[:60_000])]
    frames = [rng.choice(frames) for _ in range(rng.randint(1, 2 * len(frames)))]
    return h2.opening() + b"".join(frames)


def lying_frame(rng: Draw, path: str, message: bytes) -> bytes:
    """Frames of any kind whose length, flags or stream are not what they say."""
    made = h2.opening()
    for _ in range(rng.randint(1, 8)):
        payload = rng.randbytes(rng.choice((0, 1, 4, 5, 8, 100, 16_384)))
        length = rng.choice((len(payload), 0, len(payload) + 1, (1 << 24) - 1))
        stream = rng.choice((0, 1, 2, 3, 1 << 31, (1 << 31) - 1))
        made += length.to_bytes(3, "big") + bytes((rng.randrange(14), rng.randrange(256)))
        made += stream.to_bytes(4, "big") + payload
    return made


def settings_flood(rng: Draw, path: str, message: bytes) -> bytes:
    """Settings of any value, many times; acknowledgements of what nobody sent."""
    made = h2.opening()
    for _ in range(rng.choice(MANY)):
        pairs = [(rng.choice((1, 2, 3, 4, 5, 6, 9, 0xFE03)), rng.choice(NUMBERS)) for _ in range(rng.randint(0, 6))]
        made += h2.settings(pairs) if rng.random() < 0.8 else h2.frame(h2.SETTINGS, h2.ACK, 0, b"")
    return made + b"".join(_frames(rng, path, message))


def rapid_reset(rng: Draw, path: str, message: bytes) -> bytes:
    """Calls that are reset as soon as they are made (CVE-2023-44487)."""
    made, frames = h2.opening(), _frames(rng, path, message)
    for number in range(rng.choice(MANY)):
        stream = 2 * number + 1
        headers = h2.header_frames(stream, h2.call_headers(path))
        made += b"".join(headers) + (frames[-1][:5] + stream.to_bytes(4, "big") + frames[-1][9:]) * (number % 2)
        made += h2.frame(h2.RST_STREAM, 0, stream, struct.pack(">I", rng.choice((0, 2, 8, 99))))
        if len(made) > LARGEST:
            break
    return made


def continuation_flood(rng: Draw, path: str, message: bytes) -> bytes:
    """Headers that never end (CVE-2024-27316), or end after megabytes."""
    made = h2.opening() + h2.frame(h2.HEADERS, 0, 1, h2.call_headers(path))
    piece = rng.choice((b"", h2.literal(b"x", b"y" * 100), h2.literal(b"x", b"y" * 15_000), rng.randbytes(100)))
    count = min(rng.choice(MANY), LARGEST // (len(piece) + 9))
    made += h2.frame(h2.CONTINUATION, 0, 1, piece) * count
    return made + h2.frame(h2.CONTINUATION, rng.choice((0, h2.END_HEADERS)), 1, b"")


def hpack_bomb(rng: Draw, path: str, message: bytes) -> bytes:
    """A large header in the dynamic table, named by a byte each time (CVE-2016-6581); bad sizes and indices."""
    block = h2.call_headers(path) + h2.indexed_literal(b"x", b"v" * rng.choice((100, 3900, 5000)))
    block += rng.choice(
        (b"\xbe" * 16_000, b"\xbe" * 200, b"\xff\xff\xff\xff\xff\x7f", b"\x3f\xe1\xff\x03", b"\x80", b"\x20")
    )
    return h2.opening() + b"".join(h2.header_frames(1, block) + h2.header_frames(3, b"\xbe" * 4000))


def odd_headers(rng: Draw, path: str, message: bytes) -> bytes:
    """Names and values that no client sends; pseudo headers lost, doubled or last."""
    values = (b"", b"\0", b"\r\nx: y", b"\xff\xfe", b"caf\xc3\xa9", b"v" * 9000, b"99999999H", b"-1S", b"1" * 60)
    names = (
        b":path",
        b":method",
        b":status",
        b"te",
        b"content-type",
        b"grpc-timeout",
        b"grpc-encoding",
        b"content-length",
    )
    names = (
        *names,
        b"traceparent",
        b"tracestate",
        b"authorization",
        b"Upper",
        b"",
        b"\0",
        b"x-bin",
        b"grpc-status",
        b"host",
    )
    known = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"x")]
    known += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    for _ in range(rng.randint(1, 6)):
        odd = (rng.choice(names), rng.choice(values))
        if rng.random() < 0.4:
            known[rng.randrange(len(known))] = odd
        else:
            known.insert(rng.randrange(len(known) + 1), odd)
    block = b"".join(h2.literal(name, value) for name, value in known)
    body = h2.frame(h2.DATA, h2.END_STREAM, 1, h2.prefixed(message[:16_000]))
    return h2.opening() + b"".join(h2.header_frames(1, block)) + body


def window_games(rng: Draw, path: str, message: bytes) -> bytes:
    """Windows of nothing, windows that overflow, windows that change while an answer is on its way."""
    made = h2.PREFACE + h2.settings([(4, rng.choice((0, 1, 65_535, (1 << 31) - 1)))])
    made += b"".join(_frames(rng, path, message))
    for _ in range(rng.choice(MANY)):
        step = struct.pack(">I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        made += h2.frame(h2.WINDOW_UPDATE, 0, rng.choice((0, 1, 3)), step)
        if rng.random() < 0.1:
            made += h2.settings([(4, rng.choice((0, 1, (1 << 31) - 1)))])
    return made


def pings(rng: Draw, path: str, message: bytes) -> bytes:
    """Pings, priorities, pushes and farewells, without end."""
    kind = rng.choice((h2.PING, h2.PRIORITY, h2.PUSH_PROMISE, h2.GOAWAY))
    size = {h2.PING: 8, h2.PRIORITY: 5, h2.PUSH_PROMISE: 4, h2.GOAWAY: 8}[kind]
    stream = 0 if kind in (h2.PING, h2.GOAWAY) else rng.choice((1, 3, 5))
    frames = h2.frame(kind, rng.choice((0, 1, 4)), stream, rng.randbytes(size)) * rng.choice(MANY)
    return h2.opening() + b"".join(_frames(rng, path, message)) * rng.randint(0, 1) + frames


def padding(rng: Draw, path: str, message: bytes) -> bytes:
    """Frames that are padding for the most part, or say that they are padded by more than they have."""
    headers, *_ = _frames(rng, path, message)
    made = h2.opening() + headers
    for _ in range(rng.choice((1, 20, 500))):
        pad = rng.choice((0, 1, 200, 255))
        made += h2.frame(h2.DATA, h2.PADDED, 1, bytes((pad,)) + bytes(rng.choice((pad, 0, 255))))
    return made + h2.frame(h2.DATA, h2.END_STREAM, 1, h2.prefixed(message[:16_000]))


def odd_message(rng: Draw, path: str, message: bytes) -> bytes:
    """A message whose prefix says what is not so: its length, that it is compressed; several where one is due."""
    body = message[:16_000]
    encoding = rng.choice(
        ((), ((b"grpc-encoding", b"gzip"),), ((b"grpc-encoding", b"deflate"),), ((b"grpc-encoding", b"x"),))
    )
    choices = (
        b"",
        b"\0\0\0",
        b"\0" + struct.pack(">I", rng.choice((len(body) + 1, 1 << 31, (1 << 32) - 1, 5 << 20))) + body,
        h2.prefixed(body, rng.choice((1, 2, 255))),
        h2.prefixed(gzip.compress(bytes(3 << 20), 1, mtime=0), 1),
        h2.prefixed(body) * rng.randint(2, 9),
        h2.prefixed(body) + b"\0",
    )
    data = rng.choice(choices)
    made = h2.opening() + b"".join(h2.header_frames(1, h2.call_headers(path, encoding)))
    pieces = [data[at : at + h2.MAX_FRAME] for at in range(0, len(data), h2.MAX_FRAME)]
    made += b"".join(h2.frame(h2.DATA, 0, 1, piece) for piece in pieces)
    return made + rng.choice((b"", h2.frame(h2.DATA, h2.END_STREAM, 1, b"")))


def endless_calls(rng: Draw, path: str, message: bytes) -> bytes:
    """Calls that are begun and not finished."""
    made = h2.opening()
    for number in range(rng.choice(MANY)):
        made += b"".join(h2.header_frames(2 * number + 1, h2.call_headers(path)))
        made += h2.frame(h2.DATA, 0, 2 * number + 1, h2.prefixed(bytes(5000))[: rng.randint(0, 300)])
    return made


HTTP2: dict[str, Maker] = {
    make.__name__: make
    for make in (
        *(damaged, shuffled, lying_frame, settings_flood, rapid_reset, continuation_flood, hpack_bomb),
        *(odd_headers, window_games, pings, padding, odd_message, endless_calls),
    )
}
