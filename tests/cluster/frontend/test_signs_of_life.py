"""A stream on which nothing comes is kept alive: headers at once, then events without tokens that clients ignore."""

import asyncio
from pathlib import Path

import grpc.aio
from scripted import scripted_cluster
from served_jobs import jobs_server, sqlite_url

from isthmus.cluster.client.client import Answer, Client, build_request
from isthmus.proto.common_pb2 import FINISH_REASON_LENGTH, SamplingParams
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.generation_pb2 import GenerateEvent, GenerateRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.jobs_pb2 import SubmitJobRequest, WatchJobRequest
from isthmus.proto.rpc.transport import Transport


async def test_a_silent_stream_says_that_it_lives() -> None:
    go = asyncio.Event()

    async def silent(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await go.wait()
        await context.write(DecodeEvent(token_ids=[65], finish_reason=FINISH_REASON_LENGTH))

    async with (
        scripted_cluster(silent, sign_of_life_s=0.05) as cluster,
        Transport().dial(cluster.gateway.address) as channel,
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
