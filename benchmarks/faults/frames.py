"""Damaged, forged and replayed frames against a real decode worker: each must be refused, and answered all the same."""

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from support.report import each

from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.kvtransfer.hashing import page_hashes, page_salt
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.sampling import Sampling

from .faulty_prefill import KINDS, FaultyPrefill

TOKENS = 4
PROMPTS = 8


@dataclass
class Rig:
    """A decode worker with a sound and a faulty prefill worker."""

    prefill: PrefillWorker
    decode: DecodeWorker
    faulty: FaultyPrefill
    stub: Any
    vocab: int
    asked: int = 0

    def refused(self) -> int:
        """Refusals that the decode worker has counted."""
        return self.decode.server.report().counters["frames_refused"]

    async def answer(self, prompt: list[int], codec: str, prefill: list[str]) -> list[int]:
        """The tokens of one request whose prefill candidates are these addresses."""
        self.asked += 1
        report = self.decode.server.report()
        tenant = f"tenant-{self.asked}"  # a new one: nothing is held or cached, and all pages are sent
        salt = page_salt(report.model.fingerprint, codec, report.codecs[codec], tenant)
        request = DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"frames-{self.asked}",
            model_fingerprint=report.model.fingerprint,
            codec=codec,
            prompt_token_ids=prompt,
            page_hashes=page_hashes(prompt, report.page_tokens, salt),
            sampling=Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True).to_pb(),
            prefill_addresses=prefill,
            tenant=tenant,
        )
        tokens: list[int] = []
        async for event in self.stub.Generate(request, timeout=60):
            tokens += event.token_ids
        return tokens


@asynccontextmanager
async def frame_rig(model: str, seed: int = 0) -> AsyncIterator[Rig]:
    """Workers on a small model in this process; frames are small, so that each answer has several."""
    shared = {"model": model, "dtype": "fp32", "tls": "off", "page_tokens": 16}
    prefill = PrefillWorker(PrefillConfig(name="prefill", chunk_tokens=64, **shared))
    decode = DecodeWorker(DecodeConfig(name="decode", **shared))
    for worker in (prefill, decode):
        await worker.start()
    faulty = FaultyPrefill(prefill.address, seed)
    await faulty.start()
    channel = Transport().dial(decode.address)
    try:
        vocab = decode.server.report().model.vocab_size
        yield Rig(prefill, decode, faulty, DecodeStub(channel), vocab)
    finally:
        await channel.close()
        await faulty.stop()
        for worker in (decode, prefill):
            await worker.stop()


async def mutate_frames(rig: Rig, count: int, seed: int = 0) -> dict[str, Any]:
    """`count` answers with one corruption each, in turn of every kind; what the decode worker made of them.

    Each request names the faulty worker first and a sound one second.
    """
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, rig.vocab) for _ in range(rng.randint(100, 150))] for _ in range(PROMPTS)]
    codecs = ("raw", "tq-k4v4")
    right = {
        (number, codec): await rig.answer(prompt, codec, [rig.prefill.address])
        for number, prompt in enumerate(prompts)
        for codec in codecs
    }
    rig.faulty.corruption = ""
    await rig.answer(prompts[0], "raw", [rig.faulty.address, rig.prefill.address])  # it has an earlier request now
    result, not_refused, wrong = Counter[str](), Counter[str](), Counter[str]()
    before = rig.refused()
    for number in each(range(count), "corrupted frames"):
        kind, which = KINDS[number % len(KINDS)], (rng.randrange(PROMPTS), codecs[rng.randrange(2)])
        rig.faulty.corruption = kind
        refused = rig.refused()
        tokens = await rig.answer(prompts[which[0]], which[1], [rig.faulty.address, rig.prefill.address])
        result["answered"] += len(tokens) == TOKENS
        result["wrong_tokens"] += sum(a != b for a, b in zip(tokens, right[which], strict=False))
        if tokens != right[which]:
            wrong[kind] += 1
        if rig.refused() != refused + 1:
            not_refused[kind] += 1
    return {
        "mutated_frames": count,
        "kinds": len(KINDS),
        "refused_frames": rig.refused() - before,
        "answered": result["answered"],
        "wrong_tokens": result["wrong_tokens"],
        "wrong": dict(wrong),
        "not_refused": dict(not_refused),
    }
