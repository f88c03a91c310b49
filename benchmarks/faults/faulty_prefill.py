"""A faulty prefill worker: it passes a real one's answers on, and corrupts one thing in each."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import grpc.aio

from isthmus.kvtransfer.frame import FrameHeader, frame_checksum
from isthmus.proto import prefill_pb2
from isthmus.proto.prefill_pb2 import KvFrame, PrefillEvent, PrefillRequest
from isthmus.proto.prefill_pb2_grpc import PrefillServicer, PrefillStub, add_PrefillServicer_to_server
from isthmus.proto.rpc.server import Server
from isthmus.proto.rpc.transport import Transport

Events = list[PrefillEvent]
SERVICE = prefill_pb2.DESCRIPTOR.services_by_name["Prefill"]


class FaultyPrefill(PrefillServicer):
    """A Prefill service in front of a real worker; `corruption` names what it does to the next answers (see KINDS)."""

    def __init__(self, real: str, seed: int = 0, transport: Transport | None = None) -> None:
        """`transport`: in plain text where none is given; it is closed at the end."""
        self.corruption = ""  # one of KINDS; "": none
        self.corrupted = 0  # answers in which something was changed
        self._rng = random.Random(seed)
        self._transport = transport or Transport()
        self._channel = self._transport.dial(real, "prefill")
        self._server: Server | None = None
        self._earlier: Events = []  # a whole answer to an earlier request

    async def start(self) -> None:
        """Listens; `address` is where."""
        server = await self._transport.listen(
            "127.0.0.1:0", {SERVICE: lambda server: add_PrefillServicer_to_server(self, server)}
        )
        self._server, self.address = server, f"127.0.0.1:{server.port}"

    async def stop(self) -> None:
        """Ends the server and the connection to the real worker."""
        if self._server is not None:
            await self._server.stop()
        await self._transport.close()

    async def Prefill(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: PrefillRequest, context: grpc.aio.ServicerContext
    ) -> None:
        intact = await self._ask(request)
        frames = [at for at, event in enumerate(intact) if event.HasField("frame")]
        at = self._rng.choice(frames)
        events = [PrefillEvent.FromString(event.SerializeToString()) for event in intact]
        if self.corruption in BYTES:
            _set(events, at, BYTES[self.corruption](events[at].frame, self._rng))
        elif self.corruption in FORGED:
            _set(events, at, _forge(events[at].frame, FORGED[self.corruption], self._rng))
        elif self.corruption in ORDER:
            ORDER[self.corruption](events, frames, self._rng)
        elif self.corruption in FOREIGN:
            other = await FOREIGN[self.corruption](self, request)
            theirs = [event for event in other if event.HasField("frame")]
            _set(events, at, theirs[min(frames.index(at), len(theirs) - 1)].frame)
        self.corrupted += bool(self.corruption)
        self._earlier = intact
        await self.answer(events, context)

    async def answer(self, events: Events, context: grpc.aio.ServicerContext) -> None:
        """Sends an answer."""
        for event in events:
            await context.write(event)

    async def _ask(self, request: PrefillRequest) -> Events:
        return [event async for event in PrefillStub(self._channel).Prefill(request)]

    async def of_request(self, request: PrefillRequest) -> Events:
        """Pages that were sent for an earlier request."""
        return self._earlier

    async def of_tenant(self, request: PrefillRequest) -> Events:
        """Pages of the same prompt for another tenant."""
        return await self._ask(_changed(request, tenant=request.tenant + "x"))

    async def of_attempt(self, request: PrefillRequest) -> Events:
        """Pages of another attempt at the same request."""
        return await self._ask(_changed(request, attempt=request.attempt + 1))

    async def of_prompt(self, request: PrefillRequest) -> Events:
        """Pages of another prompt, sent under this request's id."""
        tokens = list(request.prompt_token_ids)
        return await self._ask(_changed(request, prompt_token_ids=[*tokens[:-1], tokens[-1] ^ 1], page_hashes=b""))


def _changed(request: PrefillRequest, **fields: object) -> PrefillRequest:
    other = PrefillRequest.FromString(request.SerializeToString())
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(other, name)[:]
            getattr(other, name).extend(value)
        else:
            setattr(other, name, value)
    return other


def _set(events: Events, at: int, frame: KvFrame) -> None:
    events[at] = PrefillEvent(frame=frame)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(1) + data[at:]


def _with(frame: KvFrame, **fields: object) -> KvFrame:
    made = {"header": frame.header, "payload": frame.payload, "checksum": frame.checksum, **fields}
    return KvFrame(**made)  # pyright: ignore[reportArgumentType]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


Mutation = Callable[[KvFrame, random.Random], KvFrame]
BYTES: dict[str, Mutation] = {
    "payload flipped": lambda f, rng: _with(f, payload=_flipped(f.payload, rng)),
    "header flipped": lambda f, rng: _with(f, header=_flipped(f.header, rng)),
    "checksum flipped": lambda f, rng: _with(f, checksum=f.checksum ^ 1 << rng.randrange(64)),
    "payload truncated": lambda f, rng: _with(f, payload=_cut(f.payload, rng)),
    "header truncated": lambda f, rng: _with(f, header=_cut(f.header, rng)),
    "payload longer": lambda f, rng: _with(f, payload=_inserted(f.payload, rng)),
}

# With a right checksum: what a frame says of itself is not what was asked for.
Forgery = Callable[[FrameHeader, random.Random], FrameHeader]


def _binding(position: int, value: object) -> Forgery:
    def forge(header: FrameHeader, rng: random.Random) -> FrameHeader:
        binding = list(header.binding)
        binding[position] = value
        return replace(header, binding=binding)

    return forge


def _section(name: str, change: int) -> Forgery:
    def forge(header: FrameHeader, rng: random.Random) -> FrameHeader:
        at = rng.randrange(len(header.sections))
        section = header.sections[at]
        changed = replace(section, **{name: max(0, getattr(section, name) + change)})
        if changed == section:
            changed = replace(section, **{name: getattr(section, name) + 1})
        return replace(header, sections=(*header.sections[:at], changed, *header.sections[at + 1 :]))

    return forge


FORGED: dict[str, Forgery] = {
    "other protocol": _binding(0, 99),
    "other request": _binding(1, "somebody else's"),
    "other attempt": _binding(2, 9),
    "other model": _binding(3, "f" * 32),
    "other codec": _binding(4, "tq-k2v2"),
    "other codec parameters": _binding(5, "0" * 16),
    "other prompt": _binding(6, b"0123456789abcdef"),
    "other layer": _section("layer", 1),
    "other heads": _section("end_head", -1),
    "other range": _section("start", 16),
    "fewer tokens": _section("tokens", -1),
}


def _forge(frame: KvFrame, forgery: Forgery, rng: random.Random) -> KvFrame:
    header = forgery(FrameHeader.unpack(frame.header), rng).pack()
    return _with(frame, header=header, checksum=frame_checksum(header, frame.payload))


def _swap(events: Events, frames: list[int], rng: random.Random) -> None:
    """Two frames; where all pages left in one, that and the commit."""
    places = [*frames, len(events) - 1]
    at = rng.randrange(max(1, len(frames) - 1))
    one, other = places[at], places[at + 1]
    events[one], events[other] = events[other], events[one]


def _repeat(events: Events, frames: list[int], rng: random.Random) -> None:
    at = rng.choice(frames)
    events.insert(at, events[at])


def _drop(events: Events, frames: list[int], rng: random.Random) -> None:
    del events[rng.choice(frames)]


def _first_token(events: Events, frames: list[int], rng: random.Random) -> None:
    first = next(event.first_token for event in events if event.HasField("first_token"))
    first.token_id ^= 1 << rng.randrange(8)


def _commit(events: Events, frames: list[int], rng: random.Random) -> None:
    events[-1].commit.digest = _flipped(events[-1].commit.digest, rng)


def _no_commit(events: Events, frames: list[int], rng: random.Random) -> None:
    del events[-1]


ORDER: dict[str, Callable[[Events, list[int], random.Random], None]] = {
    "reordered": _swap,
    "duplicated": _repeat,
    "lost": _drop,
    "first token flipped": _first_token,
    "commit flipped": _commit,
    "commit lost": _no_commit,
}

FOREIGN: dict[str, Callable[[FaultyPrefill, PrefillRequest], Awaitable[Events]]] = {
    "replayed from another request": FaultyPrefill.of_request,
    "replayed from another tenant": FaultyPrefill.of_tenant,
    "replayed from another attempt": FaultyPrefill.of_attempt,
    "replayed from another prompt": FaultyPrefill.of_prompt,
}

KINDS = (*BYTES, *FORGED, *ORDER, *FOREIGN)
