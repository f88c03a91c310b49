"""Clients that mean harm to a gateway by what they send or fail to send; and what that costs it and everybody else.

Each kind keeps at it for some seconds. Beside it good clients ask one request after the other: their tokens must be
right, and what the gateway holds of memory and descriptors must be bounded and given back.
"""

import asyncio
import contextlib
import resource
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import psutil
from support import raw_grpc as h2
from support.report import percentiles

from isthmus.cluster.client.client import build_request
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.rpc.transport import Transport

from .cluster import processes

GENERATE, WATCH = "/isthmus.v1.Generation/Generate", "/grpc.health.v1.Health/Watch"
IDLE, SLOW, SILENT, STREAMS, BOMBS_AT_ONCE = 3_000, 300, 50, 5_000, 64
LOOK_S = 0.05  # between two looks at memory
SETTLE_S = 15.0  # for descriptors to be given back
CALM, GOOD_AT_ONCE = 20, 2  # good requests before, and beside
GOOD_LIMIT_S = 60.0


@dataclass(frozen=True)
class Target:
    """A port, and a request that would be answered there."""

    address: str
    request: bytes
    tls: ssl.SSLContext | None = None

    @contextlib.asynccontextmanager
    async def connections(self, count: int) -> AsyncIterator[list[asyncio.StreamWriter]]:
        """So many connections, of which what arrives is thrown away; those that are refused are left out."""
        writers: list[asyncio.StreamWriter] = []
        readers: list[asyncio.Task[None]] = []
        try:
            for _ in range(count):
                with contextlib.suppress(OSError):
                    reader, writer = await h2.connect(self.address, self.tls)
                    writers.append(writer)
                    readers.append(asyncio.create_task(_discard(reader)))
            yield writers
        finally:
            for task in readers:
                task.cancel()
            for writer in writers:
                writer.transport.abort()


async def _discard(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(1 << 16):
            continue


async def _send(writer: asyncio.StreamWriter, data: bytes) -> bool:
    """Whether the other side still takes something."""
    if writer.is_closing():
        return False
    writer.write(data)
    try:
        async with asyncio.timeout(5):
            await writer.drain()
    except (OSError, TimeoutError):
        return False
    return True


async def slow_loris(target: Target, seconds: float) -> None:
    """A byte each second: of the preface, of the headers of a request, of its message."""
    headers, *data = h2.request_frames(1, GENERATE, target.request)
    starts = (b"", h2.opening(), h2.opening() + headers)
    rests = (h2.opening(), headers, b"".join(data))
    async with target.connections(SLOW) as writers:
        for number, writer in enumerate(writers):
            writer.write(starts[number % 3])
        for second in range(int(seconds)):
            for number, writer in enumerate(writers):
                if not writer.is_closing():
                    writer.write(rests[number % 3][second : second + 1])
            await asyncio.sleep(1)


async def idle(target: Target, seconds: float) -> None:
    """Connections on which nothing is asked: a third never says a word, a third is left after the preface."""
    async with target.connections(IDLE) as writers:
        for number, writer in enumerate(writers):
            with contextlib.suppress(OSError):
                writer.write((b"", h2.PREFACE, h2.opening())[number % 3])
        await asyncio.sleep(seconds)


async def large_metadata(target: Target, seconds: float) -> None:
    """Headers below the limit and far beyond it, in one frame and in hundreds."""
    end, sizes = time.monotonic() + seconds, (4_000, 12_000, 60_000, 1 << 20, 4 << 20)
    while time.monotonic() < end:
        async with target.connections(len(sizes) * 4) as writers:
            for number, writer in enumerate(writers):
                size = sizes[number % len(sizes)]
                many = [(b"x%d" % at, b"v" * 50) for at in range(size // 60)]
                headers = [(b"x", b"v" * size)] if number % 2 else many
                await _send(writer, h2.opening() + b"".join(h2.request_frames(1, GENERATE, target.request, headers)))
            await asyncio.sleep(0.5)


async def bombs(target: Target, seconds: float) -> None:
    """Messages that say they are compressed: a few kB that are 15 MiB of zeros, or a gigabyte; many at once."""
    end, bodies = time.monotonic() + seconds, [_zeros(15), _zeros(1024)]
    while time.monotonic() < end:
        async with target.connections(8) as writers:
            for number, writer in enumerate(writers):
                await _send(writer, h2.opening())
                for stream in range(1, 2 * BOMBS_AT_ONCE, 2):
                    encoded = ((b"grpc-encoding", b"gzip"),)
                    frames = h2.request_frames(stream, GENERATE, bodies[number % 2], encoded, compressed=1)
                    if not await _send(writer, b"".join(frames)):
                        break
            await asyncio.sleep(0.5)


def _zeros(mebibytes: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(mebibytes)) + packer.flush()


async def many_streams(target: Target, seconds: float) -> None:
    """Thousands of requests on one connection that are begun and never finished, each with part of a message."""
    piece = h2.prefixed(bytes(1 << 20))[:4096]
    async with target.connections(4) as writers:
        for writer in writers:
            await _send(writer, h2.opening())
            for stream in range(1, 2 * STREAMS, 2):
                headers = h2.header_frames(stream, h2.call_headers(GENERATE))
                if not await _send(writer, b"".join(headers) + h2.frame(h2.DATA, 0, stream, piece)):
                    break
        await asyncio.sleep(seconds)


async def never_reading(target: Target, seconds: float) -> None:
    """Connections that ask for answers and pings and read nothing of what comes back."""
    opened: list[asyncio.StreamWriter] = []
    try:
        for _ in range(SILENT):
            reader, writer = await h2.connect(target.address, target.tls)
            opened.append(writer)
            pause = getattr(reader, "_transport", None)
            if pause is not None:
                pause.pause_reading()
            writer.write(h2.PREFACE + h2.settings([(4, (1 << 31) - 1)]))  # no window holds anything back
            for stream in range(1, 9, 2):
                writer.write(b"".join(h2.request_frames(stream, GENERATE, target.request)))
            writer.write(b"".join(h2.request_frames(9, WATCH, b"")))
        end, ping = time.monotonic() + seconds, h2.frame(h2.PING, 0, 0, bytes(8)) * 100
        while time.monotonic() < end:
            for writer in opened:
                if not writer.is_closing() and writer.transport.get_write_buffer_size() < 1 << 20:
                    writer.write(ping)
            await asyncio.sleep(0.2)
    finally:
        for writer in opened:
            writer.transport.abort()


KINDS: dict[str, Callable[[Target, float], Coroutine[Any, Any, None]]] = {
    "slow loris": slow_loris,
    "idle connections": idle,
    "large metadata": large_metadata,
    "compressed bombs": bombs,
    "many streams": many_streams,
    "never reading": never_reading,
}


@dataclass
class Good:
    """What became of good requests."""

    expected: list[int]
    latencies_ms: list[float] = field(default_factory=list)
    wrong: int = 0
    errors: list[str] = field(default_factory=list)

    async def ask(self, stub: Any, request: GenerateRequest) -> None:
        """One of them; always its right tokens, or it counts as wrong or as an error."""
        begun = time.monotonic()
        try:
            tokens = [
                token async for event in stub.Generate(request, timeout=GOOD_LIMIT_S) for token in event.token_ids
            ]
        except grpc.aio.AioRpcError as error:
            self.errors.append(f"{error.code().name}: {error.details()}")
            return
        self.latencies_ms.append(1e3 * (time.monotonic() - begun))
        self.wrong += tokens != self.expected


def good_request(vocab: int, tokens: int = 6) -> GenerateRequest:
    """A greedy one."""
    prompt = [(7 * position) % (vocab - 3) + 3 for position in range(40)]
    return build_request(
        token_ids=prompt, codec="raw", sampling={"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    )


def _harm(kind: str, target: Target, seconds: float) -> None:
    """In a process of its own, so that it takes nothing from those who measure."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(KINDS[kind](target, seconds))


async def abuse(
    kind: str, address: str, request: GenerateRequest, process: psutil.Process, seconds: float, transport: Transport
) -> dict[str, Any]:
    """One kind of abuse of the server of `process` for some seconds; what it cost, in MB, descriptors and ms."""
    async with transport.dial(address) as channel:
        stub: Any = GenerationStub(channel)
        calm = Good([token async for event in stub.Generate(request) for token in event.token_ids])
        for _ in range(CALM):
            await calm.ask(stub, request)
        beside, before = Good(calm.expected), _held(process)
        target = Target(address, request.SerializeToString())
        harming = processes().Process(target=_harm, args=(kind, target, seconds), daemon=True)
        harming.start()

        async def keep_asking() -> None:
            while harming.is_alive():
                await beside.ask(stub, request)

        async def keep_looking() -> list[tuple[int, int]]:
            seen = [before]
            while harming.is_alive():
                seen.append(_held(process))
                await asyncio.sleep(LOOK_S)
            return seen

        try:
            asking = asyncio.gather(*(keep_asking() for _ in range(GOOD_AT_ONCE)))
            seen = await keep_looking()
            await asking
        finally:
            harming.kill()
            harming.join()
        after = await _settled(process, before[1])
    return {
        "rss_mb": {"before": before[0], "peak": max(rss for rss, _ in seen), "after": after[0]},
        "descriptors": {"before": before[1], "peak": max(count for _, count in seen), "after": after[1]},
        "ended": harming.exitcode,
        "good": len(beside.latencies_ms),
        "wrong": calm.wrong + beside.wrong,
        "errors": calm.errors + beside.errors,
        "calm_ms": percentiles(calm.latencies_ms),
        "beside_ms": percentiles(beside.latencies_ms) if beside.latencies_ms else None,
    }


async def _settled(process: psutil.Process, descriptors: int) -> tuple[int, int]:
    end = time.monotonic() + SETTLE_S
    while (held := _held(process))[1] > descriptors and time.monotonic() < end:
        await asyncio.sleep(LOOK_S)
    return held


def _held(process: psutil.Process) -> tuple[int, int]:
    """Resident MB and open descriptors."""
    return process.memory_info().rss >> 20, process.num_fds()
