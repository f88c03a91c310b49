"""The vLLM engine protocol of a gateway with scripted workers, by the stubs that SMG's own package has."""

import asyncio
import hashlib
import io
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from scripted import Script, ScriptedCluster, client_of, hangs, says, scripted_cluster, served
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated.common_pb2 import FlushCacheRequest, GetTokenizerRequest, SubscribeKvEventsRequest
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub
from support.certificates import CLUSTER, CertificateFiles

from isthmus.cluster.access.key_file import KeyDocument, change
from isthmus.cluster.access.keys import new_key
from isthmus.cluster.access.settings import AccessSettings, Limits
from isthmus.cluster.client.client import build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.proto.common_pb2 import FINISH_REASON_EOS, FINISH_REASON_LENGTH, TokenLogprobs, TopLogprob
from isthmus.proto.decode_pb2 import DecodeEvent, DecodeRequest
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.settings import TlsFiles, security_of

PROMPT = list(b"prompt")


@asynccontextmanager
async def engine(*scripts: Script, **settings: Any) -> AsyncIterator[tuple[ScriptedCluster, Any]]:
    async with (
        scripted_cluster(*scripts, engine_protocol="vllm", **settings) as cluster,
        grpc.aio.insecure_channel(cluster.gateway.address) as channel,
    ):
        yield cluster, VllmEngineStub(channel)


def request(request_id: str = "r", stream: bool = True, **sampling: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id=request_id,
        tokenized=vllm.TokenizedInput(original_text="prompt", input_ids=PROMPT),
        sampling_params=vllm.SamplingParams(**{"max_tokens": 50, **sampling}),
        stream=stream,
    )


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call
    return raised.value.code(), raised.value.details() or ""


async def test_a_stream_has_chunks_and_one_end() -> None:
    async with engine(says("hello", size=2)) as (cluster, stub):
        got = [each async for each in stub.Generate(request(stop_token_ids=[7], temperature=0.0, seed=-1))]
    chunks = [each.chunk for each in got[:-1]]
    assert [bytes(chunk.token_ids) for chunk in chunks] == [b"he", b"ll", b"o"]
    assert [(chunk.prompt_tokens, chunk.completion_tokens) for chunk in chunks] == [(6, 2), (6, 2), (6, 1)]
    end = got[-1].complete
    assert (end.finish_reason, list(end.output_ids), end.prompt_tokens) == ("length", [], 6)
    asked = cluster.decodes[0].requests[0]
    assert list(asked.prompt_token_ids) == PROMPT
    assert (asked.sampling.temperature, asked.sampling.max_tokens, asked.sampling.seed) == (0, 50, (1 << 64) - 1)
    assert asked.sampling.top_p == asked.sampling.repetition_penalty == 1  # 0 on the wire: not set


async def test_without_streaming_there_is_one_message() -> None:
    async with engine(says("hello", finish=FINISH_REASON_EOS)) as (cluster, stub):
        asked = request(stream=False)
        asked.sampling_params.ClearField("max_tokens")
        got = [each async for each in stub.Generate(asked)]
        assert cluster.decodes[0].requests[0].sampling.max_tokens == 1000 - len(PROMPT)  # what the context leaves
    assert len(got) == 1
    end = got[0].complete
    assert (bytes(end.output_ids), end.finish_reason, end.completion_tokens) == (b"hello", "stop", 5)
    assert end.WhichOneof("matched_stop") is None


async def test_a_stop_string_ends_with_the_token_that_completes_it() -> None:
    async with engine(says("hello world")) as (_, stub):
        got = [each async for each in stub.Generate(request(stream=False, stop=["lo"]))]
    end = got[0].complete
    assert (bytes(end.output_ids), end.finish_reason) == (b"hello", "stop")


async def test_log_probabilities_are_those_of_the_tokens() -> None:
    async def script(asked: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        for token in b"ab":
            logprobs = TokenLogprobs(logprob=-0.5, top=[TopLogprob(token_id=token, logprob=-0.5)])
            await context.write(DecodeEvent(token_ids=[token], logprobs=[logprobs]))
        await context.write(DecodeEvent(finish_reason=FINISH_REASON_LENGTH))

    async with engine(script) as (_, stub):
        whole = (await stub.Generate(request(stream=False, logprobs=1)).read()).complete
        chunks = [each.chunk async for each in stub.Generate(request(logprobs=0)) if each.HasField("chunk")]
    assert list(whole.output_logprobs.token_ids) == list(b"ab")
    assert list(whole.output_logprobs.token_logprobs) == [-0.5, -0.5]
    assert [list(top.token_ids) for top in whole.output_logprobs.top_logprobs] == [[97], [98]]
    assert [list(chunk.output_logprobs.token_ids) for chunk in chunks] == [[97], [98]]
    assert not any(chunk.output_logprobs.top_logprobs for chunk in chunks)  # 0: of the chosen ones alone


@pytest.mark.parametrize("stream", [True, False])
async def test_an_abort_ends_the_answer_and_frees_everything(stream: bool) -> None:
    async with engine(hangs) as (cluster, stub):
        call = stub.Generate(request("mine", stream))
        if stream:
            assert list((await call.read()).chunk.token_ids) == [65]
        while not cluster.decodes[0].requests:
            await asyncio.sleep(0.01)
        await stub.Abort(vllm.AbortRequest(request_ids=["other", "mine", "mine"]))
        end = (await call.read()).complete
        assert (end.finish_reason, end.prompt_tokens) == ("abort", 6)
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        async with asyncio.timeout(5):
            await cluster.gateway.load.wait_idle()
        assert cluster.decodes[0].cancelled == 1


async def test_a_client_that_goes_away_frees_everything() -> None:
    async with engine(hangs) as (cluster, stub):
        call = stub.Generate(request())
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            await cluster.gateway.load.wait_idle()
            while not cluster.decodes[0].cancelled:
                await asyncio.sleep(0.01)
        await stub.Abort(vllm.AbortRequest(request_ids=["r"]))  # as SMG does, late


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json"),
        ({"data_parallel_rank": 1}, "data_parallel_rank"),
        ({"media_refs": vllm.MediaRefs(items=[vllm.MediaRef(url="data:,")])}, "media_refs"),
        ({"mm_inputs": vllm.MultimodalInputs(mm_hashes=["x"])}, "mm_inputs"),
        ({"sampling_params": vllm.SamplingParams(structural_tag="{}")}, "structural_tag"),
        ({"sampling_params": vllm.SamplingParams(truncate_prompt_tokens=3)}, "truncate_prompt_tokens"),
        ({"sampling_params": vllm.SamplingParams(logprobs=-1)}, "logprobs"),
        ({"sampling_params": vllm.SamplingParams(prompt_logprobs=-1)}, "prompt_logprobs"),
        ({"sampling_params": vllm.SamplingParams(logit_bias={-1: 1})}, "logit_bias"),
        ({"sampling_params": vllm.SamplingParams(temperature=-1)}, "temperature"),
        ({"sampling_params": vllm.SamplingParams(grammar="root ::= (")}, "grammar"),
        ({"sampling_params": vllm.SamplingParams(grammar="x" * 70_000)}, "70000 characters"),
    ],
)
async def test_what_has_no_meaning_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    async with engine(hangs) as (cluster, stub):
        asked = vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=PROMPT), **fields)
        code, details = await failure(stub.Generate(asked))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert named in details
        assert not cluster.decodes[0].requests


async def test_methods_of_a_single_engine_are_refused() -> None:
    async with engine(hangs) as (_, stub):
        assert (await failure(stub.Embed(vllm.EmbedRequest())))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await failure(stub.FlushCache(FlushCacheRequest())))[0] is grpc.StatusCode.UNIMPLEMENTED
        events = stub.SubscribeKvEvents(SubscribeKvEventsRequest())
        assert (await failure(events))[0] is grpc.StatusCode.UNIMPLEMENTED
        assert (await failure(stub.Generate(vllm.GenerateRequest())))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_a_gateway_asks_before_it_sends_anything() -> None:
    async with engine(hangs, model=served(eos_token_ids=frozenset({3}))) as (cluster, stub):
        async with asyncio.timeout(5):
            while not (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy:
                await asyncio.sleep(0.02)
        model = await stub.GetModelInfo(vllm.GetModelInfoRequest())
        assert (model.served_model_name, model.model_path) == ("bytes", "bytes")
        assert (model.max_context_length, model.max_req_input_len, model.vocab_size) == (1000, 999, 256)
        assert list(model.eos_token_ids) == [3]
        call = stub.Generate(request())
        await call.read()
        server = await stub.GetServerInfo(vllm.GetServerInfoRequest())
        assert (server.server_type, server.active_requests, server.data_parallel_size) == ("vllm-grpc", 1, 1)
        (load,) = (await stub.GetLoads(vllm.GetLoadsRequest())).loads
        assert (load.num_total_reqs, load.max_total_num_tokens) == (1, 6400)
        code, _ = await failure(stub.GetTokenizer(GetTokenizerRequest()))
        assert code is grpc.StatusCode.NOT_FOUND
        call.cancel()
        await cluster.gateway.drain(5)
        assert not (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy


async def test_the_tokenizer_is_all_that_leaves_the_model_s_folder(tmp_path: Path) -> None:
    files = {"tokenizer.json": "x" * 200_000, "chat_template.jinja": "hi"}
    for name, text in {**files, "model.safetensors": "w", "config.json": "{}", "generation_config.json": "{}"}.items():
        (tmp_path / name).write_bytes(text.encode() if name != "tokenizer.json" else _noise(200_000))
    async with engine(hangs, model=served(folder=tmp_path)) as (_, stub):
        chunks = [chunk async for chunk in stub.GetTokenizer(GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert len(chunks) > 2
    assert [chunk.sha256 for chunk in chunks] == [*[""] * (len(chunks) - 1), hashlib.sha256(data).hexdigest()]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert sorted(archive.namelist()) == sorted(files)
        assert archive.read("chat_template.jinja") == b"hi"


def _noise(size: int) -> bytes:
    """Bytes that do not compress."""
    return b"".join(hashlib.sha256(bytes([number % 256, number // 256])).digest() for number in range(size // 32))


async def test_who_has_no_key_is_not_let_in_and_ends_nobody_s_answer(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made = [new_key("tenant", limits=Limits()) for _ in range(2)]
    change(path, lambda _: KeyDocument(keys=tuple(record for _, record in made)))
    async with engine(hangs, access=AccessSettings(keys_file=str(path))) as (cluster, stub):
        a, b = (grpc.aio.Metadata(("authorization", f"Bearer {key}")) for key, _ in made)
        assert (await failure(stub.Generate(request())))[0] is grpc.StatusCode.UNAUTHENTICATED
        assert (await failure(stub.GetTokenizer(GetTokenizerRequest())))[0] is grpc.StatusCode.UNAUTHENTICATED
        call = stub.Generate(request(), metadata=a)
        await call.read()
        assert cluster.decodes[0].requests[0].sampling.max_tokens == 50
        await stub.Abort(vllm.AbortRequest(request_ids=["r"]), metadata=b)
        await asyncio.sleep(0.1)
        assert cluster.gateway.load.active == 1
        await stub.Abort(vllm.AbortRequest(request_ids=["r"]), metadata=a)
        assert (await call.read()).complete.finish_reason == "abort"


async def test_over_tls_it_is_what_clients_may_call(tmp_path: Path) -> None:
    folder = CertificateFiles(tmp_path)
    security = security_of(TlsFiles(**folder.files("gateway")), CLUSTER, "gateway")
    gateway = Gateway("127.0.0.1:0", served(), (), GatewayConfig(engine_protocol="vllm"), security=security)
    await gateway.start()
    client = Transport(security_of(TlsFiles(**folder.files("client")), CLUSTER, "client"))
    try:
        stub: Any = VllmEngineStub(client.dial(gateway.address, "gateway"))
        assert not (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy  # there are no workers
        assert (await failure(stub.Generate(request())))[0] is grpc.StatusCode.UNAVAILABLE
    finally:
        await client.close()
        await gateway.stop()


async def test_it_is_off_by_default() -> None:
    async with scripted_cluster(says("x")) as cluster, grpc.aio.insecure_channel(cluster.gateway.address) as channel:
        code, _ = await failure(VllmEngineStub(channel).HealthCheck(vllm.HealthCheckRequest()))
        assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_without_its_package_the_gateway_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("isthmus.cluster.smg.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "smg_grpc_proto", None)
    gateway = Gateway("127.0.0.1:0", served(), (), GatewayConfig(engine_protocol="vllm"))
    with pytest.raises(InvalidRequest, match=r"pip install 'isthmus\[smg\]'"):
        await gateway.start()
    await gateway.stop()


async def test_both_ways_in_give_the_same_tokens() -> None:
    async with engine(says("hello")) as (cluster, stub), client_of(cluster.gateway) as client:
        answer = await client.answer(build_request(token_ids=PROMPT))
        got = [each async for each in stub.Generate(request(stream=False))]
    assert list(got[0].complete.output_ids) == answer.token_ids
