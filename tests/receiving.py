"""A prefill worker in this process, and a receiver that speaks to it as a decode worker does."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.kvtransfer.frame import PROTOCOL_VERSION, Binding
from isthmus.kvtransfer.hashing import page_salt, prompt_hash
from isthmus.kvtransfer.receiver import KvReceiver
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.common_pb2 import Priority, TransferStats
from isthmus.proto.prefill_pb2 import PrefillEvent, PrefillRequest
from isthmus.proto.prefill_pb2_grpc import PrefillStub
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.sampling import Sampling

_numbers = itertools.count()


@dataclass
class Received:
    """What one transfer brought."""

    first_token: int
    stats: TransferStats
    kv: torch.Tensor  # [layers, 2, tokens, KV heads, D], NaN where the receiver held it
    encoded: dict[tuple[int, int], bytes]  # (layer, first token) -> bytes of the section, in order for each layer

    def wire(self, start: int, end: int) -> dict[int, bytes]:
        """For each layer the bytes of the tokens [start, end), where sections begin and end."""
        layers = sorted({layer for layer, _ in self.encoded})
        return {
            layer: b"".join(data for at, data in self.encoded.items() if at[0] == layer and start <= at[1] < end)
            for layer in layers
        }

    @property
    def reused(self) -> tuple[int, int]:
        """Tokens from the worker's caches and from the store."""
        return self.stats.cached_tokens, self.stats.stored_tokens


@dataclass
class Receiving:
    """One prefill worker and a channel to it."""

    worker: PrefillWorker
    stub: Any

    def request(self, token_ids: list[int], *, codec: str = "raw", **fields: Any) -> PrefillRequest:
        report = self.worker.server.report()
        return PrefillRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"test-{next(_numbers)}",
            attempt=1,
            model_fingerprint=report.model.fingerprint,
            codec=codec,
            codec_hash=report.codecs[codec],
            page_tokens=report.page_tokens,
            prompt_token_ids=token_ids,
            sampling=Sampling(temperature=0, max_tokens=1).to_pb(),
            **{"priority": Priority.PRIORITY_STANDARD, **fields},
        )

    def receiver(self, request: PrefillRequest, *, prompt_logprobs: int | None = None) -> KvReceiver:
        """What checks the transfer of a request."""
        codec = self.worker._codecs.get(request.codec)
        salt = page_salt(request.model_fingerprint, codec.name, codec.params_hash, request.tenant)
        binding = Binding(
            request_id=request.request_id,
            attempt=request.attempt,
            model_fingerprint=request.model_fingerprint,
            codec=codec.name,
            codec_hash=codec.params_hash,
            prompt_hash=prompt_hash(request.prompt_token_ids, salt),
        )
        tokens, held = len(request.prompt_token_ids), request.held_pages * request.page_tokens
        layers = self.worker._model.layers
        return KvReceiver(binding, codec, layers, request.page_tokens, tokens, held, prompt_logprobs)

    async def receive(self, request: PrefillRequest) -> Received:
        """Runs one transfer to its end; every frame is checked as a decode worker checks it."""
        receiver, layers, tokens = self.receiver(request), self.worker._model.layers, len(request.prompt_token_ids)
        kv = torch.full((len(layers), 2, tokens, layers[0].kv_heads, layers[0].head_dim), float("nan"))
        first, encoded = -1, dict[tuple[int, int], bytes]()
        event: PrefillEvent
        async for event in self.stub.Prefill(request, timeout=120):
            if event.HasField("first_token"):
                first = event.first_token.token_id
            if event.HasField("frame"):
                for section in receiver.accept(event.frame):
                    header = section.header
                    encoded[header.layer, header.start] = bytes(section.data)
                    both = receiver.decode(section, torch.float32)
                    kv[header.layer, :, header.start : header.start + header.tokens] = torch.stack(both)
            if event.HasField("commit"):
                receiver.finish(event.commit)
                return Received(first, event.commit.stats, kv, encoded)
        raise AssertionError("no commit came")

    def computed(self) -> int:
        """Prompt tokens that the worker has computed since its start."""
        return self.worker.server.report().counters["prompt_tokens"]


@asynccontextmanager
async def prefill_worker(model: str, **settings: Any) -> AsyncIterator[Receiving]:
    """A worker in fp32; at the end its pages must add up, and none may be in use."""
    worker = PrefillWorker(
        PrefillConfig(**{"model": model, "dtype": "fp32", "tls": "off", "name": "prefill"} | settings)
    )
    await worker.start()
    transport = Transport()
    try:
        yield Receiving(worker, PrefillStub(transport.dial(worker.address)))
    finally:
        await transport.close()
        await worker.stop()
    worker._prefixes.table.check()
    assert worker._prefixes.table.in_use == 0
    assert worker._host.pinned == 0
