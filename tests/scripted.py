"""Workers that follow a script, a model of bytes, and a gateway on top: the gateway's tests need no weights."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from isthmus.cluster.client.client import Client
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.grammar_trials import GrammarTrials
from isthmus.cluster.text.served import ServedModel
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.model.text.conversation import Conversation
from isthmus.proto import decode_pb2, worker_pb2
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH, TransferStats
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeServicer, add_DecodeServicer_to_server
from isthmus.proto.rpc.server import Server
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_READY,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    ModelReport,
    PageCounts,
    WatchRequest,
    WorkerReport,
)
from isthmus.proto.worker_pb2_grpc import add_WorkerServicer_to_server
from isthmus.worker.service import ReportServicer

FINGERPRINT = "f" * 32
CODECS = {"raw": "r0", "tq-k4v4": "t0"}

Script = Callable[[DecodeRequest, grpc.aio.ServicerContext], Awaitable[None]]


class ByteText:
    """A tokenizer and detokenizer whose tokens are the bytes of UTF-8 text."""

    has_chat_template = True

    def bytes_of(self, token_id: int) -> bytes:
        return bytes([token_id])

    def encode(self, text: str, *, most_tokens: int | None = None) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self, conversation: Conversation, *, most_tokens: int | None = None, parse_special: bool = False
    ) -> list[int]:
        text = "".join(f"<{message['role']}>{message['content']}" for message in conversation.messages)
        return list((text + ("..." if conversation.continue_final else "")).encode())


class ByteDecoder:
    """Text of whole characters only."""

    def __init__(self) -> None:
        self._held = b""

    def push(self, token_ids: Sequence[int]) -> str:
        self._held += bytes(token_ids)
        text = self._held.decode(errors="ignore")
        self._held = self._held[len(text.encode()) :]
        return text

    def finish(self) -> str:
        return self._held.decode(errors="replace")


def served(**changes: Any) -> ServedModel:
    """The model of bytes: 256 tokens, a context of 1,000."""
    from isthmus.model.text.tokenizer import StopStrings

    fields: dict[str, Any] = {
        "name": "bytes",
        "fingerprint": FINGERPRINT,
        "architecture": "BytesForCausalLM",
        "context_length": 1000,
        "vocab_size": 256,
        "tokenizer": ByteText(),
        "new_decoder": ByteDecoder,
        "new_stops": StopStrings,
        "grammars": GrammarTrials({}, frozenset({255})),
    }
    return ServedModel(**{**fields, **changes})


def report_of(role: int, **changes: Any) -> WorkerReport:
    """A ready worker with 100 pages of 64 tokens."""
    name = "prefill" if role == WORKER_ROLE_PREFILL else "decode"
    fields: dict[str, Any] = {
        "worker_id": f"{name}-0",
        "role": role,
        "health": WORKER_HEALTH_READY,
        "protocol_version": PROTOCOL_VERSION,
        "model": ModelReport(name="bytes", fingerprint=FINGERPRINT, context_length=1000, vocab_size=256),
        "codecs": CODECS,
        "default_codec": "tq-k4v4",
        "page_tokens": 64,
        "pages": PageCounts(total=100, free=100),
    }
    return WorkerReport(**{**fields, **changes})


class SilentReports(ReportServicer):
    """Reports until it is told to fall silent: then its streams stay open and say nothing."""

    def __init__(self, report: Callable[[], WorkerReport], silent: asyncio.Event) -> None:
        super().__init__(report)
        self._silent = silent

    async def Watch(self, request: WatchRequest, context: grpc.aio.ServicerContext) -> None:
        watching = asyncio.create_task(super().Watch(request, context))
        try:
            await self._silent.wait()
            watching.cancel()
            await asyncio.Event().wait()
        finally:
            watching.cancel()


@dataclass
class Scripted(DecodeServicer):
    """A worker that reports what it is told to and answers as its script says."""

    report: WorkerReport
    script: Script | None = None
    requests: list[DecodeRequest] = field(default_factory=list)
    cancelled: int = 0
    server: Server | None = None
    silent: asyncio.Event = field(default_factory=asyncio.Event)  # set: it reports no more
    transport: Transport = field(default_factory=Transport)

    async def start(self, listen: str = "127.0.0.1:0") -> None:
        self.reports = SilentReports(lambda: self.report, self.silent)
        services = {
            decode_pb2.DESCRIPTOR.services_by_name["Decode"]: lambda server: add_DecodeServicer_to_server(self, server),
            worker_pb2.DESCRIPTOR.services_by_name["Worker"]: lambda server: add_WorkerServicer_to_server(
                self.reports, server
            ),
        }
        server = await self.transport.listen(listen, services)
        await server.set_serving(True)
        self.server = server

    @property
    def address(self) -> str:
        assert self.server is not None
        return f"127.0.0.1:{self.server.port}"

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.stop()

    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: DecodeRequest, context: grpc.aio.ServicerContext
    ) -> None:
        self.requests.append(request)
        assert self.script is not None
        try:
            await self.script(request, context)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def says(text: str, *, size: int = 1, finish: int = FINISH_REASON_LENGTH) -> Script:
    """A script that sends the bytes of `text`, `size` tokens an event, and then ends."""

    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        tokens = list(text.encode())
        for start in range(0, len(tokens), size):
            await context.write(DecodeEvent(token_ids=tokens[start : start + size]))
        stats = TransferStats(kv_bytes_bf16=4000, kv_bytes_wire=1000, kv_bytes_before_prefill_end=500)
        await context.write(DecodeEvent(finish_reason=finish, transfer=stats))

    return script


async def hangs(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
    """A script that sends one token and then nothing."""
    await context.write(DecodeEvent(token_ids=[65]))
    await asyncio.Event().wait()


@dataclass
class ScriptedCluster:
    """A gateway, one prefill worker that only reports, and decode workers."""

    gateway: Gateway
    prefill: Scripted
    decodes: list[Scripted]


def client_of(gateway: Gateway) -> Client:
    """A client that may order too."""
    return Client(gateway.address, admin=gateway.admin_address)


@asynccontextmanager
async def scripted_cluster(
    *scripts: Script, model: ServedModel | None = None, **settings: Any
) -> AsyncIterator[ScriptedCluster]:
    """A gateway that is ready, with one decode worker for each script; `settings` are the gateway's."""
    prefill = Scripted(report_of(WORKER_ROLE_PREFILL))
    decodes = [
        Scripted(report_of(WORKER_ROLE_DECODE, worker_id=f"decode-{number}"), script)
        for number, script in enumerate(scripts)
    ]
    for worker in (prefill, *decodes):
        await worker.start()
    addresses = [worker.address for worker in (prefill, *decodes)]
    gateway = Gateway("127.0.0.1:0", model or served(), addresses, GatewayConfig(**{"preflight": False, **settings}))
    await gateway.start()
    try:
        async with asyncio.timeout(10):
            while len(gateway.fleet.table.routing.decode) < len(decodes) or not gateway.fleet.table.routing.prefill:
                await gateway.fleet.change.wait()
        yield ScriptedCluster(gateway, prefill, decodes)
        assert gateway.transport.open_channels == len(gateway.fleet.statuses())
    finally:
        await gateway.stop()
        for worker in (prefill, *decodes):
            await worker.stop()
    assert gateway.transport.open_channels == 0


@contextmanager
def in_thread(cluster: AbstractAsyncContextManager[ScriptedCluster]) -> Iterator[Gateway]:
    """A scripted cluster's gateway, which runs in a thread of its own: for callers that block."""
    ready, gateways, ends = threading.Event(), list[Gateway](), list[asyncio.Event]()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        ends.append(asyncio.Event())
        async with cluster as running:
            gateways.append(running.gateway)
            ready.set()
            await ends[0].wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    yield gateways[0]
    loop.call_soon_threadsafe(ends[0].set)
    thread.join()
    loop.close()
