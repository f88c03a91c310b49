"""Everything that is turned away at the door, and what becomes of what is let in."""

from typing import Any

import pytest
from routing_tables import routing_table_of
from scripted import CODECS, ByteText, served

from isthmus.cluster.client.client import build_request
from isthmus.cluster.requests.request import ResolvedRequest, resolve, validate
from isthmus.cluster.router.routing_table import RoutingTable
from isthmus.cluster.router.worker_columns import WorkerLoad
from isthmus.cluster.text.served import InputLimits, ServedModel
from isthmus.kvtransfer.codecs.registry import codec_names
from isthmus.model.text.conversation import Conversation
from isthmus.proto.errors import InvalidRequest, IsthmusError, NotFound, Unavailable
from isthmus.proto.generation_pb2 import GenerateRequest


def workers_of(*, pages: int = 100, codecs: dict[str, str] = CODECS) -> RoutingTable:
    worker = WorkerLoad(address="w", codecs=codecs, page_tokens=64, pages_total=pages, pages_free=pages)
    return routing_table_of([worker], [worker])


async def let_in(
    request: GenerateRequest, *, model: ServedModel | None = None, workers: RoutingTable | None = None
) -> ResolvedRequest:
    return await resolve(request, model or served(), workers or workers_of(), "tq-k4v4")


async def refusal(request: GenerateRequest, error: type[IsthmusError], **where: Any) -> str:
    with pytest.raises(error) as raised:
        await let_in(request, **where)
    message = str(raised.value)
    assert "\n" not in message
    return message


async def test_defaults_are_completed() -> None:
    admitted = await let_in(build_request(prompt="hello"))
    assert admitted.prompt_token_ids == list(b"hello")
    assert (admitted.codec, admitted.sampling.max_tokens) == ("tq-k4v4", 256)
    assert len(admitted.request_id) == 16
    assert admitted.call_id.startswith(f"{admitted.request_id}.")
    again = await let_in(build_request(prompt="hello"))
    assert again.sampling.seed != admitted.sampling.seed


async def test_what_the_client_says_is_kept() -> None:
    request = build_request(token_ids=[1, 2], sampling={"seed": 0, "max_tokens": 5}, codec="raw", model="bytes")
    request.request_id = "mine"
    admitted = await let_in(request)
    assert (admitted.request_id, admitted.codec, admitted.prompt_token_ids) == ("mine", "raw", [1, 2])
    assert (admitted.sampling.seed, admitted.sampling.max_tokens) == (0, 5)


async def test_chat_goes_through_the_template() -> None:
    admitted = await let_in(build_request(chat=[{"role": "user", "content": "hi"}]))
    assert bytes(admitted.prompt_token_ids) == b"<user>hi"


async def test_a_chat_may_go_on_in_its_last_message() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    admitted = await let_in(build_request(chat=messages, continue_final_message=True))
    assert bytes(admitted.prompt_token_ids) == b"<user>hi<assistant>Well,..."
    message = await refusal(build_request(prompt="x", continue_final_message=True), InvalidRequest)
    assert message == "continue_final_message without a chat; allowed: with the messages of a chat"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (build_request(prompt="é" * 51), "prompt of 102 bytes; allowed: at most 101"),
        (build_request(chat=[{"role": "user", "content": "é" * 51}]), "chat of 112 bytes; allowed: at most 101"),
        (
            build_request(chat=[{"role": "user", "content": "x"}] * 4),
            "chat.messages has 4 messages; allowed: at most 3",
        ),
        (
            build_request(token_ids=[999] * 1000),
            "prompt of 1000 tokens; allowed: at most 999 (the model's context is 1000)",
        ),
    ],
)
async def test_sizes_are_bounded_before_any_work(request_: GenerateRequest, message: str) -> None:
    class Untouched(ByteText):
        def encode(self, text: str, **_how: Any) -> list[int]:
            raise AssertionError("tokenized")

        def encode_chat(self, conversation: Conversation, **_how: Any) -> list[int]:
            raise AssertionError("tokenized")

    model = served(tokenizer=Untouched(), limits=InputLimits(max_prompt_bytes=101, max_chat_messages=3))
    assert await refusal(request_, InvalidRequest, model=model) == message
    with pytest.raises(InvalidRequest) as raised:  # what jobs ask
        await validate(request_, model)
    assert str(raised.value) == message


async def test_what_fits_the_bounds_is_let_in() -> None:
    model = served(limits=InputLimits(max_prompt_bytes=100, max_chat_messages=3))
    assert len((await let_in(build_request(prompt="é" * 50), model=model)).prompt_token_ids) == 100
    await let_in(build_request(chat=[{"role": "user", "content": "x"}] * 3), model=model)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest(), "the request has no input; allowed: prompt, chat or tokens"),
        (build_request(prompt=""), "the prompt is empty; allowed: at least one character"),
        (build_request(token_ids=[]), "the prompt has no token ids; allowed: at least one"),
        (build_request(token_ids=[5, 256]), "tokens has token id 256; allowed: 0 to 255"),
        (build_request(chat=[]), "the chat has no messages; allowed: at least one"),
        (
            build_request(chat=[{"role": "robot", "content": "x"}]),
            "unknown role 'robot' in a chat message; allowed: system, developer, user, assistant, tool",
        ),
        (
            build_request(prompt="x" * 1000),
            "prompt of 1000 tokens; allowed: at most 999 (the model's context is 1000)",
        ),
        (build_request(prompt="x", sampling={"temperature": -1}), "temperature is -1; allowed: [0, 100]"),
        (build_request(prompt="x", sampling={"top_p": 0}), "top_p is 0; allowed: (0, 1]"),
        (build_request(prompt="x", sampling={"min_p": 1.5}), "min_p is 1.5; allowed: [0, 1]"),
        (build_request(prompt="x", sampling={"temperature": float("nan")}), "temperature is nan; allowed: [0, 100]"),
        (build_request(prompt="x", sampling={"max_tokens": 0}), "max_tokens is 0; allowed: 1 or more"),
        (build_request(prompt="x", sampling={"n": 0}), "n is 0; allowed: 1 to 64"),
        (build_request(prompt="x", sampling={"n": 65}), "n is 65; allowed: 1 to 64"),
        (build_request(prompt="x", sampling={"logprobs": 21}), "logprobs is 21; allowed: at most 20"),
        (build_request(prompt="x", sampling={"prompt_logprobs": 21}), "prompt_logprobs is 21; allowed: at most 20"),
        (
            build_request(prompt="x", sampling={"logit_bias": {7: 1.0, 256: -1.0}}),
            "logit_bias has token id 256; allowed: 0 to 255",
        ),
        (
            build_request(prompt="x", sampling={"logit_bias": {7: 100.5}}),
            "logit_bias of token 7 is 100.5; allowed: [-100, 100]",
        ),
        (
            build_request(prompt="x", sampling={"logit_bias": {7: float("nan")}}),
            "logit_bias of token 7 is nan; allowed: [-100, 100]",
        ),
        (
            build_request(prompt="x", sampling={"logit_bias": dict.fromkeys(range(1025), 1.0)}),
            "1025 tokens in logit_bias; allowed: at most 1024",
        ),
        (build_request(prompt="x", sampling={"stop": [""]}), "a stop string of 0 characters; allowed: 1 to 256"),
        (
            build_request(prompt="x", sampling={"stop_token_ids": [256]}),
            "stop_token_ids has token id 256; allowed: 0 to 255",
        ),
        (
            GenerateRequest(prompt="x", request_id="i" * 129),
            "request_id of 129 characters; allowed: at most 128",
        ),
        (
            GenerateRequest(prompt="x", request_id="a\nb"),
            "request_id has characters that cannot be printed; allowed: printable ones",
        ),
        (GenerateRequest(prompt="x", tenant="t" * 129), "tenant of 129 characters; allowed: at most 128"),
        (
            GenerateRequest(prompt="x", priority=9),  # pyright: ignore[reportArgumentType]
            "priority is 9; allowed: PRIORITY_UNSPECIFIED, PRIORITY_INTERACTIVE, PRIORITY_STANDARD, PRIORITY_BATCH",
        ),
    ],
)
async def test_invalid(request_: GenerateRequest, message: str) -> None:
    assert await refusal(request_, InvalidRequest) == message


async def test_unknown_names_are_answered_with_the_known_ones() -> None:
    assert await refusal(build_request(prompt="x", model="gpt"), NotFound) == "no model 'gpt' here; available: bytes"
    message = await refusal(build_request(prompt="x", codec="zip"), NotFound)
    assert message == "no codec 'zip'; allowed: raw, tq-k4v4"
    known = next(name for name in codec_names() if name not in CODECS)
    message = await refusal(build_request(prompt="x", codec=known), NotFound)
    assert message == f"codec '{known}' is not offered by this cluster; allowed: raw, tq-k4v4"


async def test_no_chat_template() -> None:
    class Plain(ByteText):
        has_chat_template = False

    request = build_request(chat=[{"role": "user", "content": "x"}])
    message = await refusal(request, InvalidRequest, model=served(tokenizer=Plain()))
    assert message == "model bytes has no chat template; allowed: prompt or tokens"


async def test_longer_than_any_worker_could_hold() -> None:
    message = await refusal(build_request(prompt="x" * 200), InvalidRequest, workers=workers_of(pages=2))
    assert message == "prompt of 200 tokens; allowed: at most 127 (what a worker can hold)"


@pytest.mark.parametrize(("pages", "room"), [(100, 100), (15, 60)])
async def test_output_is_cut_to_context_and_workers(pages: int, room: int) -> None:
    request = build_request(prompt="x" * 900, sampling={"max_tokens": 500, "min_tokens": 400})
    sampling = (await let_in(request, workers=workers_of(pages=pages))).sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (room, room)


async def test_no_workers() -> None:
    message = await refusal(build_request(prompt="x"), Unavailable, workers=RoutingTable())
    assert message == "no pair of prefill and decode workers is ready"
