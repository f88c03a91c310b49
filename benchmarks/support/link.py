"""What one link carries: KV frames from a process to another over loopback, by the transport, messages, checksums and
writes of a transfer. Nothing is computed and nothing decoded: what is left is what moving them takes."""

import asyncio
import multiprocessing
import os
import time
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import grpc.aio

from isthmus.kvtransfer.frame import Binding, Digest, FrameWriter, SectionHeader, frame_checksum
from isthmus.proto import prefill_pb2
from isthmus.proto.prefill_pb2 import PrefillAccepted, PrefillEvent, PrefillRequest
from isthmus.proto.prefill_pb2_grpc import PrefillServicer, PrefillStub, add_PrefillServicer_to_server
from isthmus.proto.rpc.streams import write_in_time

from .dialling import transport_as

SERVICE = prefill_pb2.DESCRIPTOR.services_by_name["Prefill"]
SECTION_BYTES = 64 << 10  # of one layer of one page, about that of a small model in bf16


class _Sender(PrefillServicer):
    """Answers with so many bytes of pages as the request's number of held pages says, in MiB."""

    def __init__(self, frame_bytes: int) -> None:
        self._frame_bytes = frame_bytes
        self._section = memoryview(os.urandom(SECTION_BYTES))

    async def Prefill(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: PrefillRequest, context: grpc.aio.ServicerContext
    ) -> None:
        binding = Binding(
            request_id=request.request_id,
            attempt=0,
            model_fingerprint="f" * 32,
            codec="raw",
            codec_hash="r0",
            prompt_hash=b"p" * 16,
        )
        writer = FrameWriter(binding, min_bytes=self._frame_bytes)
        await write_in_time(context, PrefillEvent(accepted=PrefillAccepted(worker_id=_security(context))))
        for number in range((request.held_pages << 20) // SECTION_BYTES):
            header = SectionHeader(number % 32, 0, 1, 64 * (number // 32), 64, "bf16", SECTION_BYTES)
            for frame in writer.add(header, (self._section,)):
                await write_in_time(context, PrefillEvent(frame=frame))
        for frame in writer.flush():
            await write_in_time(context, PrefillEvent(frame=frame))
        await write_in_time(context, PrefillEvent(commit=writer.commit()))


def _security(context: grpc.aio.ServicerContext) -> str:
    """What the connection of a call is protected by."""
    found: Any = context
    return next(iter(found.auth_context().get("transport_security_type", ())), b"plain text").decode()


def _serve(tls: str, frame_bytes: int, to: Connection) -> None:
    os.environ["ISTHMUS_TLS"] = tls

    async def serve() -> None:
        sender = _Sender(frame_bytes)
        server = await transport_as("prefill").listen(
            "127.0.0.1:0", {SERVICE: lambda server: add_PrefillServicer_to_server(sender, server)}
        )
        to.send(server.port)
        await asyncio.to_thread(to.recv)
        await server.stop()

    asyncio.run(serve())


@contextmanager
def serving(tls: str, frame_bytes: int) -> Any:
    """A process that sends; its port."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(tls, frame_bytes, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("end")
        process.join(10)
        process.kill()


async def receive(tls: str, port: int, mib: int) -> float:
    """Seconds from the first byte to the commit of one transfer of so many MiB, each frame checked."""
    os.environ["ISTHMUS_TLS"] = tls
    transport = transport_as("decode")
    try:
        stub: Any = PrefillStub(transport.dial(f"127.0.0.1:{port}", "prefill"))
        call, digest = stub.Prefill(PrefillRequest(request_id="link", held_pages=mib)), Digest()
        accepted: PrefillEvent = await call.read()
        assert accepted.accepted.worker_id == ("ssl" if tls == "auto" else "insecure"), "what was measured"
        begun_s = time.perf_counter()
        while isinstance(event := await call.read(), PrefillEvent):
            if event.HasField("commit"):
                took_s = time.perf_counter() - begun_s
                assert (event.commit.digest, digest.payload_bytes) == (digest.digest(), mib << 20)
                return took_s
            frame = event.frame
            if frame_checksum(frame.header, frame.payload) != frame.checksum:
                raise ValueError("a frame was damaged")
            digest.add(frame)
        raise ValueError("the transfer has no end")
    finally:
        await transport.close()


def link_speeds(sides: list[str], frame_bytes: int, mib: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of each transfer, by side, in turns."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as stack:
        ports = {side: stack.enter_context(serving(side, frame_bytes)) for side in sides}
        for number in range(rounds + 1):
            for side in sides:
                took_s = asyncio.run(receive(side, ports[side], mib if number else 64))
                if number:  # the first one is to warm up
                    found[side].append((mib << 20) / took_s / 1e9)
    return found
