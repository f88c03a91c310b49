"""What a prefill worker does under load: a receiver that stops reading, deadlines, priorities."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from models import model_path
from receiving import Receiving, prefill_worker

from isthmus.proto.common_pb2 import Priority
from isthmus.proto.prefill_pb2_grpc import PrefillStub

PROMPT = [(7 * position) % 500 for position in range(1000)]


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Returns once `condition` holds; TimeoutError after `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def buffered(worker: Receiving) -> int:
    return worker.worker.server.report().host_buffer_bytes


async def test_a_receiver_that_stops_reading_holds_host_memory_only_and_new_work_is_refused():
    prompts = [[number, *PROMPT[1:]] for number in range(24)]
    async with prefill_worker(model_path("tiny-llama"), host_buffer_gib=2 / 1024) as worker:
        calls = []
        # As little as gRPC can be told to read ahead of its caller.
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
        channel = grpc.aio.insecure_channel(worker.worker.address, options=options)
        for prompt in prompts:
            call = PrefillStub(channel).Prefill(worker.request(prompt), timeout=60)
            try:
                assert (await call.read()).HasField("accepted")
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "send buffer" in (error.details() or "")
                break
            calls.append(call)
            await until(lambda: worker.computed() == 1000 * len(calls) and not worker.worker._prefixes.table.in_use)
        else:
            raise AssertionError("the send buffer has no bound")
        one_prompt = 1000 * 3 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, D, fp32
        assert 2 << 20 < buffered(worker) <= (2 << 20) + one_prompt
        await channel.close()
        await until(lambda: buffered(worker) == 0, 5)
        await until(lambda: worker.worker._host.pinned == 0, 5)
        assert (await worker.receive(worker.request(PROMPT))).first_token >= 0


async def test_a_slow_receiver_gets_everything_in_the_end():
    async with prefill_worker(model_path("tiny-llama")) as worker:
        expected = await worker.receive(worker.request(PROMPT))
        slow = worker.stub.Prefill(worker.request(PROMPT), timeout=60)
        await slow.read()
        others = [await worker.receive(worker.request(PROMPT[:number])) for number in (100, 500, 900)]
        assert all(other.first_token >= 0 for other in others)
        payload = b""
        while not (event := await slow.read()).HasField("commit"):
            payload += event.frame.payload if event.HasField("frame") else b""
        assert len(payload) == sum(map(len, expected.encoded.values()))


async def test_a_deadline_ends_a_prompt_that_waits():
    async with prefill_worker(model_path("tiny-llama"), chunk_tokens=64) as worker:
        busy = [asyncio.create_task(worker.receive(worker.request([n, *PROMPT[1:]]))) for n in range(4)]
        await until(lambda: worker.worker._engine.active == 4)
        call = worker.stub.Prefill(worker.request(PROMPT[1:]), timeout=0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read():
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert all(done.first_token >= 0 for done in await asyncio.gather(*busy))


async def test_batch_work_yields_to_interactive_work():
    async with prefill_worker(model_path("tiny-llama"), chunk_tokens=64) as worker:
        ends = {}

        async def run(name: str, prompt: list[int], priority: Priority.ValueType) -> None:
            await worker.receive(worker.request(prompt, priority=priority))
            ends[name] = time.monotonic()

        batch = asyncio.create_task(run("batch", PROMPT[:900], Priority.PRIORITY_BATCH))
        await until(lambda: worker.computed() > 0)
        later = [[n, *PROMPT[1:900]] for n in range(1, 4)]
        await asyncio.gather(batch, *(run("chat", prompt, Priority.PRIORITY_INTERACTIVE) for prompt in later))
        assert ends["chat"] < ends["batch"]


async def test_a_prompt_of_an_answer_that_resumes_interrupts_the_step_in_work():
    short = [9, *PROMPT[1:300]]
    async with prefill_worker(model_path("tiny-llama"), chunk_tokens=1024) as alone:
        expected = [await alone.receive(alone.request(prompt, codec="tq-k4v4")) for prompt in (PROMPT, short)]
    async with prefill_worker(model_path("tiny-llama"), chunk_tokens=1024) as worker:
        engine, begun, layer = worker.worker._engine, threading.Event(), itertools.count()
        between_layers = engine._between_layers

        def wait_for_the_other() -> None:
            """Once, in the middle of the first step."""
            if next(layer) == 1:
                begun.set()
                while not engine._resuming:
                    time.sleep(0.005)
            between_layers()

        engine._runner._before_layer = wait_for_the_other
        long = asyncio.create_task(worker.receive(worker.request(PROMPT, codec="tq-k4v4")))
        await until(begun.is_set)
        resumed = await worker.receive(worker.request(short, codec="tq-k4v4", resumes=True))
        interrupted = await long
        assert resumed.stats.first_token_unix_ns < interrupted.stats.first_token_unix_ns, "all of it is one step"
        for got, wanted in zip((interrupted, resumed), expected, strict=True):
            assert (got.first_token, got.encoded) == (wanted.first_token, wanted.encoded)
