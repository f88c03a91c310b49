"""Bytes to any port: noise, and HTTP/2 that goes wrong."""

import asyncio
import contextlib
import random

from support.raw_grpc import connect

from .fleet import Fleet
from .http2 import HTTP2, RAW
from .inputs import Input, Outcome
from .values import Values

CONNECT_S, WRITE_S = 5.0, 2.0
WAITS_S = (0.0, 0.01, 0.05, 0.3)  # for an answer, before the connection ends


async def send(fleet: Fleet, outcome: Outcome, number: int, rng: random.Random, kind: str) -> None:
    """One connection: what is written there, and how it ends."""
    method = rng.choice(fleet.methods)
    address = rng.choice(method.addresses)
    what, make = rng.choice(sorted((HTTP2 if kind == "http2" else RAW).items()))
    message = Values(rng, fleet.known).request(method.input, fleet.valid.get(method.input.full_name, ()))
    data = make(rng, method.path, message)
    outcome.sent(Input(kind=kind, target=fleet.label(address), what=what, number=number, data=data))
    await deliver(fleet, address, data, rng, inside=kind == "http2" or rng.random() < 0.4)


async def deliver(fleet: Fleet, address: str, data: bytes, rng: random.Random, *, inside: bool) -> None:
    """Writes the bytes in one or several pieces, `inside` TLS or before it, where the port has TLS; reads for a while,
    and closes in order or not."""
    inside = inside and not fleet.is_plain(address)
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await connect(fleet.where(address), fleet.doors.context if inside else None)
    except (OSError, TimeoutError):
        return  # the process is being started again: who died is counted by whoever watches it
    try:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(WRITE_S):
                for at in range(0, len(data), step := rng.choice((1 << 22, 5000, max(1, len(data) // 7)))):
                    writer.write(data[at : at + step])
                    await writer.drain()
                if rng.random() < 0.3 and writer.can_write_eof():
                    writer.write_eof()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(rng.choice(WAITS_S)):
                while await reader.read(1 << 16):
                    continue
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
