"""SGLang's gateway itself, its wheel from the package index, in front of a cluster of processes: `make test-smg`.

It is installed beside the environment (.venv/smg), never in it: nothing here depends on it.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import jsonschema
import openai
import pytest
from clusters import wait_ready
from support.processes import Running, free_port, isthmus, running_worker

from isthmus.proto.common_pb2 import SamplingParams
from isthmus.proto.generation_pb2 import Chat, ChatMessage, GenerateRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.worker_pb2 import ClusterStatus, GetStatusRequest
from isthmus.proto.worker_pb2_grpc import ClusterStub

SMG = Path(__file__).parents[3] / ".venv" / "smg" / "bin" / "smg"
MODEL = "smollm2-135m"
QUESTION = "What is the capital of France? Tell me about it."

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}

pytestmark = pytest.mark.skipif(not SMG.is_file(), reason="SMG is not installed: make test-smg")


@dataclass
class Fronted:
    """A cluster and SMG before it."""

    gateway: str
    admin: str
    client: openai.OpenAI
    decodes: list[Running]

    def ours(self, *, chat: str = "", prompt: str = "", **sampling: Any) -> str:
        """The text that our own door gives."""
        asked = GenerateRequest(sampling=SamplingParams(temperature=0, **sampling))
        if chat:
            asked.chat.CopyFrom(Chat(messages=[ChatMessage(role="user", content=chat)]))
        else:
            asked.prompt = prompt
        with grpc.insecure_channel(self.gateway) as channel:
            return "".join(event.text for event in GenerationStub(channel).Generate(asked, timeout=120))

    def ask(self, question: str = QUESTION, **fields: Any) -> Any:
        return self.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": question}], temperature=0, **fields
        )

    def status(self) -> ClusterStatus:
        with grpc.insecure_channel(self.admin) as channel:
            return ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=10)

    def wait_idle(self, within_s: float = 10) -> None:
        """Returns once nothing runs and no page is in use; AssertionError after `within_s`."""
        end, left = time.monotonic() + within_s, []
        while time.monotonic() < end:
            status = self.status()
            left = [status.active_requests, *((w.running_requests, w.pages.in_use) for w in status.workers)]
            if left == [0, *[(0, 0)] * len(status.workers)]:
                return
            time.sleep(0.1)
        raise AssertionError(f"active, (running, pages in use) of each worker: {left}")


@contextmanager
def smg(*arguments: str) -> Iterator[str]:
    """Runs SMG; yields its URL once it answers and has the model."""
    port = free_port()
    own = ("--host", "127.0.0.1", "--port", str(port))
    metrics = ("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()))
    # It would ask the hub for a tokenizer before it asks the cluster.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([SMG, "launch", *own, *metrics, *arguments], stdout=subprocess.DEVNULL, env=environment)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def fronted() -> Iterator[Fronted]:
    own = (MODEL, "fp32", 1)
    gateway, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with (
        _plain_text(),
        running_worker("prefill", *own) as prefill,
        running_worker("decode", *own) as first,
        running_worker("decode", *own) as second,
        isthmus(
            *("gateway", "--listen", gateway, "--admin-listen", admin, "--model", MODEL, "--engine-protocol", "vllm"),
            *("--workers", ",".join(worker.address for worker in (prefill, first, second))),
        ),
    ):
        wait_ready(admin, 3, 300)
        with smg("--worker-urls", f"grpc://{gateway}") as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            _wait_model(client)
            yield Fronted(gateway, admin, client, [first, second])


@contextmanager
def _plain_text() -> Iterator[None]:
    """What SMG speaks to its workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_TLS", "off")
        yield


def _wait_model(client: openai.OpenAI, within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while True:
        try:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=1)
            return
        except openai.APIError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def test_a_chat_is_answered_as_by_our_own_door(fronted: Fronted) -> None:
    whole = fronted.ask(max_tokens=40)
    assert whole.choices[0].message.content == fronted.ours(chat=QUESTION, max_tokens=40)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    text, usage, reason = "", None, None
    for chunk in fronted.ask(max_tokens=40, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
    assert text == whole.choices[0].message.content
    assert reason == whole.choices[0].finish_reason
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_prompt_is_completed_as_by_our_own_door(fronted: Fronted) -> None:
    prompt = "The capital of France is"
    made = fronted.client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=24)
    assert made.choices[0].text == fronted.ours(prompt=prompt, max_tokens=24)
    assert (made.choices[0].finish_reason, made.usage and made.usage.completion_tokens) == ("length", 24)


def test_smg_s_other_apis_give_the_same_text(fronted: Fronted) -> None:
    expected = fronted.ours(chat=QUESTION, max_tokens=16)
    made = fronted.client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=16)
    assert made.output_text == expected
    url = str(fronted.client.base_url)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16}
    answer = httpx.post(f"{url}messages", json=asked, timeout=60).raise_for_status().json()  # Anthropic's
    assert answer["content"][0]["text"] == expected


def test_a_stop_string_ends_the_text_before_it(fronted: Fronted) -> None:
    whole = fronted.ask(max_tokens=40).choices[0].message.content
    word = whole.split()[3]
    cut = fronted.ask(max_tokens=40, stop=[word]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(word)], "stop")


def test_log_probabilities_are_told_for_each_token(fronted: Fronted) -> None:
    made = fronted.ask(max_tokens=5, logprobs=True, top_logprobs=2).choices[0]
    assert made.logprobs is not None
    assert "".join(each.token for each in made.logprobs.content) == made.message.content
    for each in made.logprobs.content:  # greedy: the token that was chosen is the likeliest
        assert each.logprob == each.top_logprobs[0].logprob >= each.top_logprobs[1].logprob


def test_several_answers_to_one_prompt(fronted: Fronted) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}
    fields |= {"n": 3, "temperature": 1, "seed": 7}
    whole = fronted.client.chat.completions.create(**fields)
    texts = {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(texts.values())) == len(texts) == 3
    streamed: dict[int, str] = {}
    for chunk in fronted.client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == texts


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, None),
        ({"extra_body": {"regex": "[0-9]{3}-[a-z]{4}"}}, "[0-9]{3}-[a-z]{4}"),
        ({"extra_body": {"ebnf": 'root ::= "yes" | "no"'}}, "yes|no"),
    ],
)
def test_an_answer_is_what_it_must_be(fronted: Fronted, fields: dict[str, Any], pattern: str | None) -> None:
    made = fronted.ask("Tell me about a city.", max_tokens=100, **fields).choices[0]
    assert made.finish_reason == "stop"
    if pattern is None:
        jsonschema.validate(json.loads(made.message.content), SCHEMA)
    else:
        assert re.fullmatch(pattern, made.message.content)


def test_a_tool_that_must_be_called_is(fronted: Fronted) -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        made = fronted.ask("The weather in Paris?", max_tokens=100, tools=[tool], tool_choice=choice).choices[0]
        assert made.finish_reason == "tool_calls"
        (call,) = made.message.tool_calls
        assert call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_a_mistake_is_a_400_with_our_reason(fronted: Fronted) -> None:
    with pytest.raises(openai.BadRequestError, match="generates"):
        fronted.client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.BadRequestError, match="a stop string of 300 characters; allowed: 1 to 256"):
        fronted.ask(max_tokens=5, stop=["x" * 300])
    with pytest.raises(openai.BadRequestError, match=r"json_schema cannot be compiled"):
        fronted.ask(
            max_tokens=5,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )


def test_a_client_that_goes_away_frees_everything(fronted: Fronted) -> None:
    for _ in range(3):
        stream = fronted.ask(max_tokens=3000, stream=True, extra_body={"ignore_eos": True})
        for _ in range(5):
            next(stream)
        assert fronted.status().active_requests == 1
        stream.close()
        fronted.wait_idle()


def test_a_decode_worker_that_is_killed_is_not_noticed(fronted: Fronted) -> None:
    fields: dict[str, Any] = {"max_tokens": 300, "extra_body": {"ignore_eos": True}}
    undisturbed = fronted.ask(**fields).choices[0].message.content
    text, killed = "", ""
    for number, chunk in enumerate(fronted.ask(stream=True, **fields)):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        if number == 20:
            busy = {worker.address for worker in fronted.status().workers if worker.running_requests}
            (victim,) = (worker for worker in fronted.decodes if worker.address in busy)
            victim.process.send_signal(signal.SIGKILL)
            killed = victim.address
    assert killed
    assert text == undisturbed
    assert fronted.ask(max_tokens=5).choices[0].message.content  # and SMG holds nothing against the cluster
