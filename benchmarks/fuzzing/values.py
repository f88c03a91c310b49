"""Requests that nobody meant: messages of any type from their descriptors, and valid ones that were damaged."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

DEPTH = 4  # of messages in messages
MOST_BYTES = 2 << 20

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
_NUMBERS = (0, 1, 2, 3, 5, 16, 63, 64, 65, 100, 511, 512, 1000, 1023, 1024, 10_000, 1 << 20, 1 << 31, 253_402_300_799)
_FLOATS = (0.0, -0.0, 1e-45, 1e-39, 1e-7, 0.5, 1.0, 1.5, 2.0, 30.0, 1e10, 3e38, -1.0, -1e-45)
_ODD_FLOATS = (float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    *("", "a", "\0", "a\0b", "\n", "hello world", "é", "😀", "\N{RIGHT-TO-LEFT OVERRIDE}x", "%s%n%00", "²", "user"),
    *("raw", "fp8", "tq-k4v4", "system", "<eos>", "' OR 1=1 --", "../../etc/passwd", "{{ 7*7 }}", "null", "-1"),
    # Addresses: none of them may resolve to a machine of somebody else.
    *("127.0.0.1:1", "[::1]:9", "localhost:0", "unix:/tmp/x", "xds:///x", "dns:///localhost:1", "127.0.0.1:99999"),
)


class Values:
    """Draws messages; `known` are values of string fields, by name, that mean something to the servers."""

    def __init__(self, rng: random.Random, known: Mapping[str, Sequence[str]]) -> None:
        self._rng = rng
        self._known = known

    def message(self, kind: Any, depth: int = DEPTH) -> Message:
        """A message of a descriptor, with some fields set to anything that their types allow."""
        made = GetMessageClass(kind)()
        share = self._rng.choice((0.2, 0.6, 1.0))
        for field in kind.fields:
            if self._rng.random() < share:
                self.set(made, field, depth)
        return made

    def changed(self, message: Message) -> Message:
        """A copy with one to three fields, of it or of messages in it, set to something else."""
        made = type(message)()
        made.CopyFrom(message)
        for _ in range(self._rng.randint(1, 3)):
            inner = made
            while True:
                below = [value for field, value in inner.ListFields() if _is_message(field)]
                if not below or self._rng.random() < 0.5:
                    break
                inner = self._rng.choice(below)
            if inner.DESCRIPTOR.fields:
                field = self._rng.choice(inner.DESCRIPTOR.fields)
                inner.ClearField(field.name)
                if self._rng.random() < 0.8:
                    self.set(inner, field, DEPTH)
        return made

    def set(self, message: Message, field: Any, depth: int) -> None:
        """Gives one field a value."""
        if field.message_type is not None and depth == 0:
            return
        if not field.is_repeated:
            if field.message_type is not None:
                getattr(message, field.name).CopyFrom(self.message(field.message_type, depth - 1))
            else:
                setattr(message, field.name, self._scalar(field))
            return
        count = self._rng.choice((0, 1, 1, 2, 3, 17, 40, 300, 5000) if field.message_type is None else (0, 1, 2, 2, 40))
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries, (key, value) = getattr(message, field.name), field.message_type.fields
            for number in range(count):
                drawn = self._scalar(key)
                entries[f"{drawn}{number}" if isinstance(drawn, str) else drawn] = self._scalar(value)
        elif field.message_type is not None:
            getattr(message, field.name).extend(self.message(field.message_type, depth - 1) for _ in range(count))
        else:
            few = [self._scalar(field) for _ in range(min(count, 20))]
            getattr(message, field.name).extend(few[number % len(few)] for number in range(count))

    def _scalar(self, field: FieldDescriptor) -> Any:
        return self._drawers[field.cpp_type](self, field)

    def _integer(self, field: FieldDescriptor) -> int:
        low, high = _BITS[field.cpp_type]
        drawn = self._rng.choice(
            (*_NUMBERS, low, high, high - 1, self._rng.randint(low, high), self._rng.randrange(512))
        )
        return min(max(drawn, low), high)

    def _float(self, field: FieldDescriptor) -> float:
        return self._rng.choice((*_FLOATS, *_ODD_FLOATS, self._rng.uniform(-3, 3)))

    def _bool(self, field: FieldDescriptor) -> bool:
        return self._rng.random() < 0.5

    def _enum(self, field: FieldDescriptor) -> int:
        return self._rng.choice((0, 1, 2, 3, 7, 99, -1, (1 << 31) - 1))

    def _bytes(self, field: FieldDescriptor) -> bytes:
        return self._rng.randbytes(self._rng.choice((0, 1, 16, 64, 1000)))

    def _text(self, field: FieldDescriptor) -> str | bytes:
        return self._bytes(field) if field.type == FieldDescriptor.TYPE_BYTES else self._string(field)

    def _string(self, field: FieldDescriptor) -> str:
        known = self._known.get(field.name, ())
        if known and self._rng.random() < 0.4:
            return self._rng.choice(known)
        text = self._rng.choice(_TEXTS)
        return text * self._rng.choice((1, 1, 1, 1, 130, 2000))

    _drawers: Mapping[int, Callable[[Any, FieldDescriptor], Any]] = {
        **dict.fromkeys(_BITS, _integer),
        FieldDescriptor.CPPTYPE_FLOAT: _float,
        FieldDescriptor.CPPTYPE_DOUBLE: _float,
        FieldDescriptor.CPPTYPE_BOOL: _bool,
        FieldDescriptor.CPPTYPE_ENUM: _enum,
        FieldDescriptor.CPPTYPE_STRING: _text,
    }

    def request(self, kind: Descriptor, valid: Sequence[Message]) -> bytes:
        """A request on the wire: anything, a valid one, or a valid one that was changed or damaged."""
        choice = self._rng.random()
        if not valid or choice < 0.25:
            return self.message(kind).SerializeToString()[:MOST_BYTES]
        template = self._rng.choice(valid)
        if choice < 0.6:
            return self.changed(template).SerializeToString()[:MOST_BYTES]
        if choice < 0.7:
            return template.SerializeToString()
        return self.damaged(template.SerializeToString())

    def damaged(self, data: bytes) -> bytes:
        """Bytes with bits flipped, a piece cut out, put in or repeated."""
        rng, changed = self._rng, bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at, end = sorted((rng.randrange(len(changed) + 1), rng.randrange(len(changed) + 1)))
            kind = rng.randrange(5)
            if kind <= 1 and changed:
                changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del changed[at:end]
            elif kind == 3:
                changed[at:at] = rng.randbytes(rng.randint(1, 12))
            elif kind == 4:
                changed += changed[at:end]
        return bytes(changed)


def parsed(kind: Descriptor, data: bytes) -> Message | None:
    """The message in some bytes; None where there is none."""
    made = GetMessageClass(kind)()
    try:
        made.ParseFromString(data)
    except DecodeError:
        return None
    return made


def _is_message(field: FieldDescriptor) -> bool:
    return field.message_type is not None and not field.is_repeated
