"""Real processes, the real model, the command line: the same system with no Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from clusters import blocking_channel, cluster_without_ray, run, wait_ready
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from isthmus.proto.common_pb2 import FinishReason, SamplingParams
from isthmus.proto.generation_pb2 import (
    Chat,
    ChatMessage,
    GenerateRequest,
    GetModelRequest,
    ListModelsRequest,
    TokenIds,
)
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.worker_pb2 import GetStatusRequest
from isthmus.proto.worker_pb2_grpc import ClusterStub

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, str]]:
    with cluster_without_ray("smollm2-135m") as running:
        yield running


@pytest.fixture(scope="module")
def server(addresses: tuple[str, str]) -> str:
    return addresses[0]


@pytest.fixture(scope="module")
def admin(addresses: tuple[str, str]) -> str:
    return addresses[1]


@pytest.fixture(scope="module")
def channel(server: str) -> Iterator[grpc.Channel]:
    with blocking_channel(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def orders(admin: str) -> Iterator[grpc.Channel]:
    with blocking_channel(admin) as opened:
        yield opened


def ask(channel: grpc.Channel, request: GenerateRequest, timeout_s: float = 60) -> list[Any]:
    return list(GenerationStub(channel).Generate(request, timeout=timeout_s))


def test_a_prompt_is_completed_with_its_figures(channel: grpc.Channel) -> None:
    request = GenerateRequest(request_id="mine", prompt="The capital of France is", sampling=GREEDY)
    events = ask(channel, request)
    text = "".join(event.text for event in events)
    assert text.startswith(" Paris"), text
    assert [event.index for event in events if event.token_ids] == list(range(12))
    last = events[-1]
    assert last.request_id == "mine"
    assert last.finish_reason == FinishReason.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.output_tokens) == (5, 12)
    assert last.timings.ttft_ms > 0
    assert last.timings.transfer.kv_bytes_bf16 == 5 * 23040
    assert last.timings.transfer.kv_bytes_wire > 5 * 23040


def test_long_prompts_cross_compressed_and_before_prefill_ends(channel: grpc.Channel) -> None:
    ids = TokenIds(ids=[(31 * position) % 40000 for position in range(1500)])
    events = ask(channel, GenerateRequest(tokens=ids, sampling=GREEDY))
    transfer = events[-1].timings.transfer
    assert transfer.kv_bytes_bf16 == 1500 * 23040
    assert transfer.kv_bytes_bf16 / transfer.kv_bytes_wire > 2.8  # 156 of the 1,500 tokens are raw
    assert transfer.kv_bytes_before_prefill_end / transfer.kv_bytes_wire > 0.6


def test_a_request_chooses_its_codec(channel: grpc.Channel) -> None:
    ids = TokenIds(ids=range(300, 900))
    wire = {}
    for codec in ("raw", "fp8", "tq-k4v4", "tq-k2v2"):
        events = ask(channel, GenerateRequest(tokens=ids, sampling=GREEDY, codec=codec))
        wire[codec] = events[-1].timings.transfer.kv_bytes_wire
    assert wire["raw"] > wire["fp8"] > wire["tq-k4v4"] > wire["tq-k2v2"]


def test_chat_goes_through_the_template(channel: grpc.Channel) -> None:
    chat = Chat(messages=[ChatMessage(role="user", content="Answer with one word: what is the capital of France?")])
    events = ask(channel, GenerateRequest(chat=chat, sampling=SamplingParams(temperature=0, max_tokens=30)))
    assert "Paris" in "".join(event.text for event in events)
    assert events[-1].finish_reason == FinishReason.FINISH_REASON_EOS


def test_sampling_with_a_seed_repeats_and_logprobs_come(channel: grpc.Channel) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=10, logprobs=2, ignore_eos=True)
    request = GenerateRequest(prompt="Once upon a time", sampling=sampling)
    first, second = ask(channel, request), ask(channel, request)
    tokens = [[token for event in events for token in event.token_ids] for events in (first, second)]
    assert tokens[0] == tokens[1]
    assert all(len(event.logprobs) == 1 and len(event.logprobs[0].top) == 2 for event in first if event.token_ids)
    other = ask(channel, GenerateRequest(prompt="Once upon a time", sampling=SamplingParams(seed=8, max_tokens=10)))
    assert [token for event in other for token in event.token_ids] != tokens[0]


def test_a_stop_string_ends_the_text_before_it(channel: grpc.Channel) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=60, stop=[","])
    events = ask(channel, GenerateRequest(prompt="Count: one, two, three,", sampling=sampling))
    assert events[-1].finish_reason == FinishReason.FINISH_REASON_STOP
    assert "," not in "".join(event.text for event in events)


BAD: list[tuple[GenerateRequest, str, str]] = [
    (GenerateRequest(prompt=""), "INVALID_ARGUMENT", "prompt is empty"),
    (GenerateRequest(), "INVALID_ARGUMENT", "no input"),
    (GenerateRequest(prompt="x " * 9000), "INVALID_ARGUMENT", "at most 8191"),
    (GenerateRequest(tokens=TokenIds(ids=[5, 49152])), "INVALID_ARGUMENT", "49152; allowed: 0 to 49151"),
    (GenerateRequest(prompt="x", sampling=SamplingParams(temperature=-1)), "INVALID_ARGUMENT", "temperature is -1"),
    (GenerateRequest(prompt="x", sampling=SamplingParams(top_p=0)), "INVALID_ARGUMENT", "top_p is 0"),
    (GenerateRequest(prompt="x", sampling=SamplingParams(max_tokens=0)), "INVALID_ARGUMENT", "max_tokens is 0"),
    (GenerateRequest(prompt="x", sampling=SamplingParams(n=65)), "INVALID_ARGUMENT", "n is 65; allowed: 1 to 64"),
    (GenerateRequest(prompt="x", codec="zip"), "NOT_FOUND", "no codec 'zip'"),
    (GenerateRequest(prompt="x", model="gpt"), "NOT_FOUND", "gpt"),
    (
        GenerateRequest(chat=Chat(messages=[ChatMessage(role="robot", content="x")])),
        "INVALID_ARGUMENT",
        "unknown role 'robot'",
    ),
    (GenerateRequest(prompt="x" * (5 << 20)), "RESOURCE_EXHAUSTED", "larger than max"),
]


@pytest.mark.parametrize(("request_", "code", "words"), BAD, ids=[f"{code}-{words}" for _, code, words in BAD])
def test_bad_input_is_refused_at_the_door(
    channel: grpc.Channel, request_: GenerateRequest, code: str, words: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, request_)
    error: Any = caught.value
    assert error.code().name == code
    assert words in error.details()
    assert "\n" not in error.details()


def test_models_and_status(channel: grpc.Channel, orders: grpc.Channel) -> None:
    stub = GenerationStub(channel)
    model = stub.GetModel(GetModelRequest())
    assert (model.context_length, model.vocab_size, model.has_chat_template) == (8192, 49152, True)
    assert model.default_codec == "tq-k4v4"
    assert [m.name for m in stub.ListModels(ListModelsRequest()).models] == [model.name]
    deadline_s = time.monotonic() + 5  # by which the pages of requests that were given up are back
    while any(worker.pages.in_use for worker in ClusterStub(orders).GetStatus(GetStatusRequest()).workers):
        assert time.monotonic() < deadline_s, "pages are in use by nobody"
        time.sleep(0.05)


def test_health_and_reflection_answer_unprepared_tools(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", "isthmus.v1.Generation"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="isthmus.v1.Generation"),
    ]
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, described = reflection.ServerReflectionInfo(iter(asked))
    assert "isthmus.v1.Generation" in [service.name for service in listed.list_services_response.service]
    files = described.file_descriptor_response.file_descriptor_proto
    names = {FileDescriptorProto.FromString(file).package for file in files}
    assert "isthmus.v1" in names


def test_the_command_line_reads_argument_file_and_stdin(server: str, tmp_path) -> None:
    own = ("--server", server, "--temperature", "0", "--max-tokens", "4")
    file = tmp_path / "prompt.txt"
    file.write_text("The capital of France is")
    answers = [
        run("generate", "The capital of France is", *own),
        run("generate", "--file", str(file), *own),
        run("generate", "-", *own, stdin=b"The capital of France is"),
    ]
    assert [answer.returncode for answer in answers] == [0, 0, 0], answers[0].stderr
    assert len({answer.stdout for answer in answers}) == 1
    assert answers[0].stdout.startswith(b" Paris")


def test_chat_keeps_the_conversation(channel: grpc.Channel, server: str) -> None:
    """Its second turn is what the API makes of the whole conversation."""
    said, expected = [], ""
    for line in ("My name is Ada. Say hello.", "What is my name?"):
        said.append(ChatMessage(role="user", content=line))
        events = ask(channel, GenerateRequest(chat=Chat(messages=said), sampling=GREEDY))
        answer = "".join(event.text for event in events)
        said.append(ChatMessage(role="assistant", content=answer))
        expected += answer + "\n"
    lines = b"My name is Ada. Say hello.\nWhat is my name?\n"
    chat = run("chat", "--server", server, "--temperature", "0", "--max-tokens", "12", stdin=lines)
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.decode().rstrip() == expected.rstrip()


def test_programs_read_json(server: str, admin: str) -> None:
    answer = run("generate", "Hello", "--json", "--max-tokens", "3", "--ignore-eos", "--server", server)
    assert len(json.loads(answer.stdout)["token_ids"]) == 3
    status = json.loads(run("status", "--json", "--admin", admin).stdout)
    assert {worker["role"] for worker in status["workers"]} == {"WORKER_ROLE_PREFILL", "WORKER_ROLE_DECODE"}


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (("generate", ""), b"", b"empty"),
        (("generate", "x", "--temperature", "-1"), b"", b"temperature"),
        (("generate", "x", "--codec", "zip"), b"", b"zip"),
        (("generate", "-"), b"\xff\xfe not text", b"UTF-8"),
        (("generate", "--file", "/no/such/file"), b"", b"/no/such/file"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(
    server: str, arguments: tuple[str, ...], stdin: bytes, words: bytes
) -> None:
    answer = run(*arguments, "--server", server, stdin=stdin)
    assert answer.returncode != 0
    assert words in answer.stderr
    assert b"Traceback" not in answer.stderr


def test_nobody_there_is_one_line_too() -> None:
    answer = run("generate", "x", "--server", "127.0.0.1:1", "--timeout", "3")
    assert answer.returncode == 1
    assert b"127.0.0.1:1" in answer.stderr
    assert b"Traceback" not in answer.stderr


def test_a_deadline_is_kept_through_all_hops(channel: grpc.Channel, orders: grpc.Channel, admin: str) -> None:
    ids = TokenIds(ids=range(1, 3000))
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, GenerateRequest(tokens=ids, sampling=SamplingParams(max_tokens=500)), timeout_s=1)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_free(orders)
    wait_ready(admin, 2)


def test_a_client_that_goes_away_frees_both_workers(channel: grpc.Channel, orders: grpc.Channel) -> None:
    for tokens, events in ((3000, 0), (600, 1), (20, 5)):
        ids = TokenIds(ids=range(1, tokens))
        sampling = SamplingParams(max_tokens=500, ignore_eos=True)
        call = GenerationStub(channel).Generate(GenerateRequest(tokens=ids, sampling=sampling))
        for _ in range(events):
            next(call)
        call.cancel()
        wait_free(orders)


def wait_free(orders: grpc.Channel, within_s: float = 5.0) -> None:
    """Returns once no worker holds a page; AssertionError after `within_s`."""
    end = time.monotonic() + within_s
    while True:
        workers = ClusterStub(orders).GetStatus(GetStatusRequest()).workers
        left = {worker.worker_id: worker.pages.in_use for worker in workers}
        if not any(left.values()):
            return
        assert time.monotonic() < end, f"pages in use: {left}"
        time.sleep(0.05)


def test_what_helm_test_runs_passes_here(server: str) -> None:
    """The pod of the chart runs this script; here it is a process beside the same gateway."""
    script = Path(__file__).parents[2] / "helm" / "files" / "generation_test.py"
    environment = os.environ | {"ISTHMUS_SERVER": server, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "KV on the wire: " in done.stdout
