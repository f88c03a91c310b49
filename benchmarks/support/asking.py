"""One request to a decode worker, the way a gateway asks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto.common_pb2 import TransferStats
from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import WorkerReport


@dataclass
class Answer:
    """What came back, and when."""

    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)  # of each token
    transfer: TransferStats = field(default_factory=TransferStats)

    @property
    def gaps_ms(self) -> list[float]:
        """Between its tokens."""
        return [1e3 * (b - a) for a, b in pairwise(self.arrivals_s)]

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.arrivals_s[0] - self.sent_s)


def decode_request(
    report: WorkerReport, prompt: Sequence[int], sampling: Sampling, prefill: Sequence[str], codec: str = ""
) -> DecodeRequest:
    """For the worker of that report; no prefill address has it compute the prompt itself."""
    return DecodeRequest(
        protocol_version=PROTOCOL_VERSION,
        request_id=f"bench-{time.monotonic_ns()}",
        model_fingerprint=report.model.fingerprint,
        codec=codec or report.default_codec,
        prompt_token_ids=prompt,
        sampling=sampling.to_pb(),
        prefill_addresses=prefill,
    )


async def ask(stub: DecodeStub, request: DecodeRequest, *, cancel_after: int | None = None) -> Answer:
    """The whole answer, or that up to `cancel_after` tokens, where the call is cancelled."""
    answer = Answer(time.perf_counter())
    call: Any = stub.Generate(request, timeout=600)
    async for event in call:
        answer.token_ids += event.token_ids
        answer.arrivals_s += [time.perf_counter()] * len(event.token_ids)
        if event.HasField("transfer"):
            answer.transfer = event.transfer
        if cancel_after is not None and len(answer.token_ids) >= cancel_after:
            call.cancel()
            break
    return answer
