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


def pinned(worker: Receiving) -> int:
    cache = worker.worker._host
    assert cache.pinned_bytes == sum(cache._pages[key].nbytes for key in cache._pins)
    return cache.pinned_bytes


async def test_receivers_that_stop_reading_hold_host_memory_up_to_its_budget_and_the_others_wait():
    one_prompt = 1000 * 3 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, D, fp32: two fit into 2 MiB
    prompts = [[number, *PROMPT[1:]] for number in range(4)]
    async with prefill_worker(model_path("tiny-llama"), host_buffer_gib=2 / 1024) as worker:
        budget = worker.worker._buffer
        # As little as gRPC can be told to read ahead of its caller.
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
        channel = grpc.aio.insecure_channel(worker.worker.address, options=options)
        calls = []
        for prompt in prompts:  # one after the other, so that they come in this order
            calls.append(PrefillStub(channel).Prefill(worker.request(prompt), timeout=600))
            assert (await calls[-1].read()).HasField("accepted")
        await until(lambda: worker.computed() == 2000 and not worker.worker._prefixes.table.in_use)
        assert (await calls[3].read()).HasField("accepted"), "a sign of life while it waits"
        assert (budget.reserved_bytes, budget.waiting, worker.computed()) == (2 * one_prompt, 2, 2000)
        report = worker.worker.server.report()
        (use,) = [use for use in report.memory if use.name == "send buffer"]
        assert (use.used_bytes, use.budget_bytes) == (2 * one_prompt, 2 << 20)
        assert (report.waiting_requests, report.waiting_tokens) == (2, 2000)
        assert 0 < buffered(worker) <= 2 * one_prompt and pinned(worker) <= 2 * one_prompt
        calls[0].cancel()
        await until(lambda: worker.computed() == 3000)
        assert budget.waiting == 1 and pinned(worker) <= 2 * one_prompt
        await channel.close()
        await until(lambda: buffered(worker) == budget.reserved_bytes == budget.waiting == pinned(worker) == 0)
        assert (await worker.receive(worker.request(PROMPT))).first_token >= 0


async def test_a_prompt_that_is_more_than_the_whole_send_buffer_is_refused():
    async with prefill_worker(model_path("tiny-llama"), host_buffer_gib=0.5 / 1024) as worker:
        with pytest.raises(grpc.aio.AioRpcError, match="host_buffer_gib") as raised:
            await worker.receive(worker.request(PROMPT))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await worker.receive(worker.request(PROMPT, codec="tq-k4v4"))).first_token >= 0


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
