"""Answers that end with their first token, before the transfer has: what is told of it, and what the router learns."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from harness import worker_pair
from models import model_path

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.common_pb2 import FINISH_REASON_EOS, FINISH_REASON_LENGTH, FINISH_REASON_STOP
from isthmus.proto.sampling import Sampling

PROMPT = [(7 * position) % 500 + 3 for position in range(200)]
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.mark.parametrize("ends", ["length", "stop", "eos"])
async def test_the_decode_worker_tells_what_is_known(ends: str) -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        whole = await pair.generate(PROMPT, Sampling(max_tokens=2, **GREEDY))  # pyright: ignore[reportArgumentType]
        assert (whole.transfer.attempt, whole.transfer.partial) == (1, False)
        first = whole.token_ids[0]
        sampling = {
            "length": Sampling(temperature=0, ignore_eos=True, max_tokens=1),
            "stop": Sampling(temperature=0, ignore_eos=True, max_tokens=9, stop_token_ids=(first,)),
            "eos": Sampling(temperature=0, max_tokens=9),
        }[ends]
        if ends == "eos":
            object.__setattr__(pair.decode.model, "eos_token_ids", frozenset([first]))
        answer = await pair.generate([*PROMPT], sampling)
        reason = {"length": FINISH_REASON_LENGTH, "stop": FINISH_REASON_STOP, "eos": FINISH_REASON_EOS}[ends]
        assert (answer.token_ids, answer.finish) == ([first], reason)
        known = answer.transfer
        assert (known.attempt, known.prefill_worker, known.partial) == (1, "prefill", True)
        assert known.first_token_unix_ns > 0
        assert known.kv_bytes_wire <= whole.transfer.kv_bytes_wire
        assert known.kv_bytes_bf16 <= whole.transfer.kv_bytes_bf16


@asynccontextmanager
async def three_prefill_workers() -> AsyncIterator[Gateway]:
    """A gateway over three prefill workers and a decode worker that computes nothing itself."""
    path = model_path("tiny-llama")
    own = {"model": path, "dtype": "fp32", "tls": "off"}
    workers = [PrefillWorker(PrefillConfig(**own, name=f"prefill-{number}")) for number in range(3)]
    workers.append(DecodeWorker(DecodeConfig(**own, name="decode-0")))  # pyright: ignore[reportArgumentType]
    for worker in workers:
        await worker.start()
    config = GatewayConfig(preflight=False, local_prefill="never")
    gateway = Gateway("127.0.0.1:0", load_served_model(path), [worker.address for worker in workers], config)
    await gateway.start()
    try:
        async with asyncio.timeout(30):
            while len(gateway.fleet.table.routing.prefill) < 3 or not gateway.fleet.table.routing.decode:
                await gateway.fleet.change.wait()
        yield gateway
    finally:
        await gateway.stop()
        for worker in workers:
            await worker.stop()


async def test_nobody_is_put_aside_for_answers_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    async with three_prefill_workers() as gateway, Client(gateway.address) as client:
        blamed: list[str] = []
        monkeypatch.setattr(gateway.fleet, "failed", blamed.append)

        async def answer(number: int, timeout_s: float = 30, **sampling: object) -> None:
            request = build_request(token_ids=[number + 3, *PROMPT], sampling={**GREEDY, **sampling})
            told = await client.answer(request, timeout_s=timeout_s)
            transfer = told.timings.transfer
            assert len(told.token_ids) == 1
            assert transfer.attempt == 1
            assert transfer.prefill_worker in {"prefill-0", "prefill-1", "prefill-2"}
            assert told.handover_ms is not None

        sampling = {**GREEDY, "max_tokens": 2}
        whole = await client.answer(build_request(token_ids=[3, *PROMPT], sampling=sampling), timeout_s=30)
        table = gateway.fleet.table.routing
        bytes_per_token = table.wire_bytes(gateway.fleet.table.default_codec())
        for number in range(16):
            await answer(number, max_tokens=1)
        await answer(0, max_tokens=9, stop_token_ids=[whole.token_ids[0]])
        assert whole.text
        await answer(0, max_tokens=9, stop=[whole.text[0]])
        for number in range(3):  # out of time before the answer's end
            with pytest.raises(grpc.aio.AioRpcError):
                await client.answer(
                    build_request(token_ids=[number, *PROMPT], sampling={**GREEDY, "max_tokens": 700}), timeout_s=0.05
                )
        # A prompt that was moved in full before its time was over counts, and names in headers are not all as long.
        assert table.wire_bytes(gateway.fleet.table.default_codec()) == pytest.approx(bytes_per_token, rel=0.02)
        assert not blamed
        async with asyncio.timeout(30):  # a busy machine may be late with a report
            while [status.reason for status in gateway.fleet.statuses()] != [""] * 4 or any(
                load.suspect for load in table.prefill.loads.values()
            ):
                await asyncio.sleep(0.05)
