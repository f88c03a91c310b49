"""A TCP proxy that can cut, delay, throttle and damage what passes through it: a bad network between two processes."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from isthmus.proto.rpc.addresses import parse_address

CHUNK = 16 << 10


class BadLink:
    """Forwards connections on a port of its own to `target`; faults apply to all connections, at once.

    `delay_s` is added to each chunk, `bytes_per_s` limits each direction of a connection, and of what comes from the
    target one bit in about `flip_every` bytes is flipped.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.target = target
        self.address = ""
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self.flip_every: int | None = None
        self.refuses = False
        self.flipped = 0
        self._rng = random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> None:
        """Listens; `address` is where."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Cuts everything and listens no more."""
        if self._server is not None:
            self._server.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Resets all connections of now; new ones are accepted unless `refuses`."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not self.refuses:
                await self._forward(reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = parse_address(self.target)
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(host, port)
            ends = {writer, far_writer}
            self._writers |= ends
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer, damages=False)),
                asyncio.create_task(self._pump(far_reader, writer, damages=True)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.wait(pumps)
                self._writers -= ends
                far_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, damages: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                writer.write(self._damaged(data) if damages and self.flip_every else data)
                await writer.drain()

    def _damaged(self, data: bytes) -> bytes:
        assert self.flip_every is not None
        damaged = bytearray(data)
        at = int(self._rng.expovariate(1 / self.flip_every))
        while at < len(damaged):
            damaged[at] ^= 1 << self._rng.randrange(8)
            self.flipped += 1
            at += 1 + int(self._rng.expovariate(1 / self.flip_every))
        return bytes(damaged)


@contextlib.asynccontextmanager
async def bad_link(target: str, seed: int = 0) -> AsyncIterator[BadLink]:
    """A proxy in front of `target`, gone at the end."""
    link = BadLink(target, seed)
    await link.start()
    try:
        yield link
    finally:
        await link.stop()
