"""A stream on which nothing comes is kept alive: headers at once, then events without tokens that clients ignore."""

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from scripted import scripted_cluster
from served_jobs import jobs_server, sqlite_url

from isthmus.cluster.client.client import Answer, Client, build_request
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH, SamplingParams
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.generation_pb2 import GenerateEvent, GenerateRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.jobs_pb2 import SubmitJobRequest, WatchJobRequest
from isthmus.proto.rpc.server import Stalled, open_channel
from isthmus.proto.rpc.signs import kept_alive


async def test_a_silent_stream_says_that_it_lives() -> None:
    go = asyncio.Event()

    async def silent(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await go.wait()
        await context.write(DecodeEvent(token_ids=[65], finish_reason=FINISH_REASON_LENGTH))

    async with (
        scripted_cluster(silent, sign_of_life_s=0.05) as cluster,
        open_channel(cluster.gateway.address) as channel,
        Client(cluster.gateway.address) as client,
    ):
        call = GenerationStub(channel).Generate(build_request(prompt="x"), timeout=30)
        await call.initial_metadata()
        signs = [await call.read() for _ in range(3)]
        assert all(isinstance(sign, GenerateEvent) and not sign.token_ids and not sign.text for sign in signs)
        answering = asyncio.create_task(client.answer(build_request(prompt="x"), timeout_s=30))
        await asyncio.sleep(0.2)
        go.set()
        answer: Answer = await answering
        assert (answer.text, answer.token_ids, answer.finish) == ("A", [65], "length")
        call.cancel()


async def test_a_silent_watcher_of_a_job_hears_that_its_stream_lives(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def hold(request: GenerateRequest, position: int) -> None:
        await go.wait()

    async with jobs_server(sqlite_url(tmp_path), hold, sign_of_life_s=0.05) as server:
        sampling = SamplingParams(max_tokens=2, seed=1)
        requests = [GenerateRequest(prompt="x", sampling=sampling)]
        job = await server.stub.SubmitJob(SubmitJobRequest(requests=requests))
        call, silent = server.stub.WatchJob(WatchJobRequest(job_id=job.job_id)), 0
        async with asyncio.timeout(20):
            while silent < 2:
                silent += not (await call.read()).events
        call.cancel()
        go.set()
        assert [event.number for event in await server.watch(job.job_id)][:2] == [1, 2]


async def test_a_sign_that_nobody_reads_ends_whatever_runs() -> None:
    async def write(message: str) -> None:
        await asyncio.sleep(0.05)
        raise Stalled("nothing was read")

    with pytest.raises(Stalled, match="nothing was read"):
        async with asyncio.timeout(20), kept_alive(write, lambda: "sign", 0.01):
            await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None and not task.cancelling()


async def test_a_sign_to_a_client_that_is_gone_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def write(message: str) -> None:
        raise RuntimeError("the call has ended")

    async with kept_alive(write, lambda: "sign", 0.01):
        await asyncio.sleep(0.1)
    assert not caplog.records
