"""A prefill and a decode worker in this process, and a client that speaks to the decode worker as a gateway does."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.common_pb2 import FinishReason, TransferStats
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.sampling import Sampling

LOOK_S = 0.02  # between two looks at whether pages are back


@dataclass
class Answer:
    """What came back for one request."""

    token_ids: list[int] = field(default_factory=list)
    finish: int = FinishReason.FINISH_REASON_UNSPECIFIED
    transfer: TransferStats = field(default_factory=TransferStats)


@dataclass
class Pair:
    """One prefill and one decode worker."""

    prefill: PrefillWorker
    decode: DecodeWorker
    stub: DecodeStub

    def request(self, token_ids: list[int], sampling: Sampling, codec: str = "raw") -> DecodeRequest:
        return DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"test-{time.monotonic_ns()}",
            model_fingerprint=self.decode.server.report().model.fingerprint,
            codec=codec,
            prompt_token_ids=token_ids,
            sampling=sampling.to_pb(),
            prefill_addresses=[self.prefill.address],
        )

    def call(self, request: DecodeRequest, timeout_s: float | None = 120) -> Any:
        return self.stub.Generate(request, timeout=timeout_s)

    async def generate(self, token_ids: list[int], sampling: Sampling, codec: str = "raw") -> Answer:
        """The whole answer to one prompt."""
        answer = Answer()
        event: DecodeEvent
        async for event in self.call(self.request(token_ids, sampling, codec)):
            answer.token_ids += event.token_ids
            answer.finish = event.finish_reason or answer.finish
            if event.HasField("transfer"):
                answer.transfer = event.transfer
        return answer

    def pages_in_use(self) -> tuple[int, int]:
        """Of the prefill and of the decode worker."""
        reports = (worker.server.report() for worker in (self.prefill, self.decode))
        prefill, decode = (report.pages.in_use for report in reports)
        return prefill, decode

    async def baseline(self, within_s: float = 5.0) -> None:
        """Returns once no page is in use, nothing waits and nothing is buffered; AssertionError after `within_s`.

        The time is counted in looks: on a machine that is too busy for a look every 20 ms it is longer, in proportion.
        """
        left: list[tuple[int, int, int, int]] = []
        for _ in range(int(within_s / LOOK_S)):
            reports = [worker.server.report() for worker in (self.prefill, self.decode)]
            left = [(r.pages.in_use, r.waiting_requests, r.running_requests, r.host_buffer_bytes) for r in reports]
            if left == [(0, 0, 0, 0)] * 2:
                assert all(r.pages.free + r.pages.cached == r.pages.total for r in reports)
                return
            await asyncio.sleep(LOOK_S)
        raise AssertionError(f"(pages, waiting, running, buffered) of prefill, decode: {left}")


@asynccontextmanager
async def worker_pair(
    model: str, *, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None
) -> AsyncIterator[Pair]:
    """Both workers in fp32 in this process; at the end everything they held must be free again."""
    workers = (
        PrefillWorker(
            PrefillConfig(**{"model": model, "dtype": "fp32", "tls": "off", "name": "prefill"} | (prefill or {}))
        ),
        DecodeWorker(
            DecodeConfig(**{"model": model, "dtype": "fp32", "tls": "off", "name": "decode"} | (decode or {}))
        ),
    )
    for worker in workers:
        await worker.start()
    transport = Transport()
    pair = Pair(*workers, DecodeStub(transport.dial(workers[1].address)))
    try:
        yield pair
        await pair.baseline()
        assert pair.decode.transport.open_channels == len(pair.decode._peers)
    finally:
        await transport.close()
        for worker in workers:
            await worker.stop()
    assert [side.open_channels for side in (transport, *(worker.transport for worker in workers))] == [0, 0, 0]
