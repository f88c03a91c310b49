"""A prefill and a decode worker with no model: answers that depend on prompt, seed and position alone, at a set pace.

For benchmarks of what lies around the model. Prompts are computed in chunks, those of batch requests last;
`slots` requests decode at once, a token each step. Run as a process: prints both addresses, ends with SIGTERM.
"""

import argparse
import asyncio
import heapq
import itertools
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from isthmus.cluster.text.served import load_served_model
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto import decode_pb2, worker_pb2
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH, PRIORITY_BATCH, TransferStats
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeServicer, add_DecodeServicer_to_server
from isthmus.proto.rpc.server import Server
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_READY,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    ModelReport,
    PageCounts,
    WorkerReport,
)
from isthmus.proto.worker_pb2_grpc import add_WorkerServicer_to_server
from isthmus.worker.service import ReportServicer

from .dialling import transport_as

PAGES, PAGE_TOKENS = 10_000, 64
CHUNK_S = 0.02  # of a prompt, computed in one go: others come between two of them


class Slots:
    """So many at once, the others in the order of their priority and arrival."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._order = itertools.count()
        self._waiting: list[tuple[bool, int, asyncio.Event]] = []
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @asynccontextmanager
    async def one(self, batch: bool) -> AsyncIterator[None]:
        """Holds a slot for as long as the block runs."""
        if self._free:
            self._free -= 1
        else:
            entry = (batch, next(self._order), asyncio.Event())
            heapq.heappush(self._waiting, entry)
            try:
                await entry[2].wait()
            except asyncio.CancelledError:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                    heapq.heapify(self._waiting)
                else:
                    self._pass_on()
                raise
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._pass_on()

    def _pass_on(self) -> None:
        if self._waiting:
            heapq.heappop(self._waiting)[2].set()
        else:
            self._free += 1


class FakeWorkers(DecodeServicer):
    """Both workers; the prefill one only reports."""

    def __init__(self, model: str, prefill_s: float, step_s: float, slots: int) -> None:
        served = load_served_model(model)
        self._model = ModelReport(
            name=served.name,
            fingerprint=served.fingerprint,
            context_length=served.context_length,
            vocab_size=served.vocab_size,
        )
        chunks = max(1, round(prefill_s / CHUNK_S))
        self._chunks_s, self._step_s = [prefill_s / chunks] * chunks, step_s
        self._prefill, self._decode = Slots(1), Slots(slots)
        self._servers: list[Server] = []  # a server that nobody holds ends

    def report(self, role: worker_pb2.WorkerRole.ValueType, name: str, slots: Slots) -> WorkerReport:
        """What a worker of that role tells of itself."""
        return WorkerReport(
            worker_id=name,
            role=role,
            health=WORKER_HEALTH_READY,
            protocol_version=PROTOCOL_VERSION,
            model=self._model,
            codecs={"raw": "r0"},
            default_codec="raw",
            page_tokens=PAGE_TOKENS,
            pages=PageCounts(total=PAGES, free=PAGES),
            waiting_requests=slots.waiting,
            running_requests=slots.running,
        )

    async def start(self) -> list[str]:
        """Serves both; their addresses."""
        addresses, transport = list[str](), transport_as("prefill", "decode")
        decode = decode_pb2.DESCRIPTOR.services_by_name["Decode"]
        worker = worker_pb2.DESCRIPTOR.services_by_name["Worker"]
        roles = (
            (WORKER_ROLE_PREFILL, "fake-prefill", self._prefill),
            (WORKER_ROLE_DECODE, "fake-decode", self._decode),
        )
        for role, name, slots in roles:
            reports = ReportServicer(lambda role=role, name=name, slots=slots: self.report(role, name, slots))
            services = {
                decode: lambda server: add_DecodeServicer_to_server(self, server),
                worker: lambda server, reports=reports: add_WorkerServicer_to_server(reports, server),
            }
            server = await transport.listen("127.0.0.1:0", services)
            await server.set_serving(True)
            self._servers.append(server)
            addresses.append(f"127.0.0.1:{server.port}")
        return addresses

    async def stop(self) -> None:
        """Cancels what runs."""
        for server in self._servers:
            await server.stop()

    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: DecodeRequest, context: grpc.aio.ServicerContext
    ) -> None:
        batch = request.priority == PRIORITY_BATCH
        tokens, emitted = tokens_for(request), len(request.emitted_token_ids)
        if tokens[:emitted] != list(request.emitted_token_ids):
            raise ValueError("the tokens to go on from are not those that were made")
        moved = TransferStats(kv_bytes_wire=1000 * len(request.prefill_addresses))
        async with self._decode.one(batch):
            for chunk_s in self._chunks_s:
                async with self._prefill.one(batch):
                    await asyncio.sleep(chunk_s)
            for position in range(emitted, len(tokens)):
                if position > emitted:
                    await asyncio.sleep(self._step_s)
                last = position + 1 == len(tokens)
                finish, transfer = (FINISH_REASON_LENGTH, moved) if last else (0, None)
                await context.write(DecodeEvent(token_ids=[tokens[position]], finish_reason=finish, transfer=transfer))


def tokens_for(request: DecodeRequest) -> list[int]:
    """The whole answer to a request."""
    drawn = random.Random(f"{list(request.prompt_token_ids)} {request.sampling.seed}")
    return [drawn.randrange(300, 40_000) for _ in range(request.sampling.max_tokens)]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer the gateway uses")
    parser.add_argument("--prefill-ms", type=float, default=20.0)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--slots", type=int, default=64)
    options = parser.parse_args()
    workers = FakeWorkers(options.model, options.prefill_ms / 1e3, options.step_ms / 1e3, options.slots)
    print(",".join(await workers.start()), flush=True)
    ends = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ends.set)
    await ends.wait()
    await workers.stop()


if __name__ == "__main__":
    asyncio.run(main())
