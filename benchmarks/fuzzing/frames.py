"""A prefill worker that lies in every field: of a frame's header, of its events, of their order and their number."""

import random
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import msgpack
import xxhash
from faults.faulty_prefill import KINDS, Events, FaultyPrefill

from isthmus.kvtransfer.frame import frame_checksum
from isthmus.proto.prefill_pb2 import KvFrame, PrefillEvent
from isthmus.proto.rpc.transport import Transport

from .values import Values

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf"), "", "x" * 70_000),
    *(b"", b"\0" * 16, b"\xff" * 70_000, [], [0] * 5000, {}, {"a": 1}, [[[[]]]]),
)
SECTION_FIELDS = 7


class LyingPrefill(FaultyPrefill):
    """Lies as `lie` says, or in one of the KINDS that must be refused."""

    def __init__(self, real: str, seed: int, transport: Transport) -> None:
        super().__init__(real, seed, transport)
        self.lie = ""  # one of LIES
        self.rng = random.Random(seed)

    def lie_as(self, lie: str, rng: random.Random) -> None:
        """What the next answers are, drawn from `rng`."""
        self.lie = self.corruption = lie
        self.rng = self._rng = rng

    async def answer(self, events: Events, context: grpc.aio.ServicerContext) -> None:
        """Sends the answer, or what the lie makes of it."""
        if self.lie in LIES:
            self.corrupted += 1
            events = LIES[self.lie](events, self.rng)
        if self.lie == REFUSING:
            code = self.rng.choice([code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
            await context.abort(
                code, self.rng.choice(("", "x" * 3000, "\N{SNOWMAN}\n")), (("isthmus-error", "Corrupt"),)
            )
        await super().answer(events, context)


Lie = Callable[[Events, random.Random], Events]


def _frame_at(events: Events, rng: random.Random) -> int:
    return rng.choice([at for at, event in enumerate(events) if event.HasField("frame")])


def _with_header(events: Events, at: int, header: bytes) -> Events:
    frame = events[at].frame
    made = KvFrame(header=header, payload=frame.payload, checksum=frame_checksum(header, frame.payload))
    return [*events[:at], PrefillEvent(frame=made), *events[at + 1 :]]


def _packed(value: Any) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


def header_field(events: Events, rng: random.Random) -> Events:
    """Any value in any field of a header, with a right checksum."""
    at = _frame_at(events, rng)
    fields = msgpack.unpackb(events[at].frame.header)
    fields[rng.randrange(len(fields))] = rng.choice(ODD)
    return _with_header(events, at, _packed(fields))


def section_field(events: Events, rng: random.Random) -> Events:
    """Any value in any field of any section, with a right checksum."""
    at = _frame_at(events, rng)
    *binding, sections = msgpack.unpackb(events[at].frame.header)
    rng.choice(sections)[rng.randrange(SECTION_FIELDS)] = rng.choice(ODD)
    return _with_header(events, at, _packed([*binding, sections]))


def header_shape(events: Events, rng: random.Random) -> Events:
    """A header that is something else: nested without end, a bomb of lengths, fields too many or too few."""
    at = _frame_at(events, rng)
    fields = msgpack.unpackb(events[at].frame.header)
    headers = (
        *(b"", b"\xc1", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xffabc", b"\x81" * 50_000),
        *(_packed(fields[:-1]), _packed([*fields, 0]), _packed([*fields[:-1], [[]] * 5000]), _packed({1: 2})),
        *(_packed([*fields[:-1], fields[-1] * 3000]), rng.randbytes(200), events[at].frame.header + b"\0"),
    )
    return _with_header(events, at, rng.choice(headers))


def any_event(events: Events, rng: random.Random) -> Events:
    """One event with any field set to anything, or one of anything put between others."""
    values, at = Values(rng, {}), rng.randrange(len(events))
    made = values.changed(events[at]) if rng.random() < 0.6 else values.message(PrefillEvent.DESCRIPTOR)
    event = PrefillEvent.FromString(made.SerializeToString())
    return [*events[:at], event, *events[at + rng.randint(0, 1) :]]


def many_events(events: Events, rng: random.Random) -> Events:
    """An event again and again, or more after the commit."""
    event = rng.choice(events)
    return rng.choice(([event] * 2000 + events, [*events, *events], [*events, *[event] * 500]))


def nothing(events: Events, rng: random.Random) -> Events:
    """An answer of nothing, or of its beginning."""
    return events[: rng.randrange(len(events))]


def any_pages(events: Events, rng: random.Random) -> Events:
    """Pages of noise whose checksums, digest and counts are all right: the wrong tokens may come of it, no more."""
    made, digest = [], xxhash.xxh3_128()
    for event in events:
        if event.HasField("frame"):
            size = len(event.frame.payload)
            payload = rng.choice((rng.randbytes(size), b"\xff" * size, b"\x7f\x80" * (size // 2) + b"\0" * (size % 2)))
            header = event.frame.header
            frame = KvFrame(header=header, payload=payload, checksum=frame_checksum(header, payload))
            digest.update(frame.checksum.to_bytes(8, "little"))
            event = PrefillEvent(frame=frame)
        elif event.HasField("commit"):
            commit = PrefillEvent.FromString(event.SerializeToString())
            commit.commit.digest = digest.digest()
            event = commit
        made.append(event)
    return made


def status(events: Events, rng: random.Random) -> Events:
    """Part of an answer, then any status."""
    return []


LIES: dict[str, Lie] = {
    lie.__name__: lie
    for lie in (header_field, section_field, header_shape, any_event, many_events, nothing, any_pages, status)
}
UNDETECTABLE = any_pages.__name__
REFUSING = status.__name__  # some of which stand for the request, and are passed on
ALL = (*KINDS, *LIES)
