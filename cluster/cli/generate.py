"""`isthmus generate` and `isthmus chat`."""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import options as opt
from .terminal.prompt import decoded, read_prompt

if TYPE_CHECKING:
    from ...proto.generation_pb2 import GenerateEvent, GenerateRequest
    from ..client.client import Answer

OnEvent = Callable[["GenerateEvent"], object]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or a pipe: read it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's chat message.")] = False,
    answer_prefix: Annotated[
        str | None, typer.Option(help="With --chat: how the answer begins; the model goes on after it.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show counts and timings on stderr.")] = False,
    as_json: opt.Json = False,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.Repetition = None,
    presence_penalty: opt.Presence = None,
    frequency_penalty: opt.Frequency = None,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = None,
    min_tokens: opt.MinTokens = None,
    stop: opt.Stop = None,
    stop_token_id: opt.StopTokenId = None,
    ignore_eos: opt.IgnoreEos = False,
    logprobs: opt.Logprobs = None,
    prompt_logprobs: opt.PromptLogprobs = None,
    n: opt.Choices = None,
    logit_bias: opt.LogitBias = None,
    codec: opt.RequestCodec = "",
    model: opt.RequestModel = "",
    request_id: Annotated[str, typer.Option(help="Your own id of the request, for the logs.")] = "",
    timeout: opt.Timeout = None,
    server: opt.Server = opt.DEFAULT_SERVER,
) -> None:
    """Complete a prompt; the text streams to stdout.

    [bold]Examples[/]

      isthmus generate "The sea is"

      isthmus generate --chat --temperature 0 "Why is the sky blue?"

      isthmus generate --file story.txt --max-tokens 64 --stats

      git log -5 | isthmus generate --chat --json
    """
    from ..client.client import build_request

    if answer_prefix is not None and not chat:
        raise typer.BadParameter("an answer has a prefix in a chat only; allowed: with --chat")
    text = read_prompt(prompt, file)
    messages = [{"role": "user", "content": text}]
    if answer_prefix is not None:
        messages.append({"role": "assistant", "content": answer_prefix})
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop or [],
        "stop_token_ids": stop_token_id or [],
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "n": n,
        "logit_bias": opt.logit_bias(logit_bias or []),
    }
    request = build_request(
        prompt=None if chat else text,
        chat=messages if chat else None,
        sampling=sampling,
        codec=codec,
        model=model,
        continue_final_message=answer_prefix is not None,
    )
    request.request_id = request_id
    events: list[GenerateEvent] = []
    one = (n or 1) == 1
    answers = _run(server, request, timeout, _show if one and not as_json else events.append)
    if as_json:
        print(json.dumps(_as_json(answers, events)))
    for number, answer in enumerate(answers, start=1):
        if not (one or as_json):
            print(f"[{number}] {answer.text}")
        if stats:
            print(_stats(answer), file=sys.stderr)


def chat(
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = None,
    codec: opt.RequestCodec = "",
    stats: Annotated[bool, typer.Option("--stats", help="Show counts and timings on stderr.")] = False,
    timeout: opt.Timeout = None,
    server: opt.Server = opt.DEFAULT_SERVER,
) -> None:
    """Talk with the model; every turn sends the whole conversation. Ctrl-D or /exit ends it.

    [bold]Examples[/]

      isthmus chat

      isthmus chat --system "You answer in one sentence." --temperature 0.2
    """
    from ..client.client import build_request

    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
    messages = [{"role": "system", "content": system}] if system else []
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        request = build_request(chat=messages, sampling=sampling, codec=codec)
        (answer,) = _run(server, request, timeout, _show)
        if stats:
            print(_stats(answer), file=sys.stderr)
        messages.append({"role": "assistant", "content": answer.text})


def _run(server: str, request: "GenerateRequest", timeout_s: float | None, on_event: OnEvent) -> "list[Answer]":
    """One request to its end. A line that was begun on stdout is ended, whatever happens."""
    shown = False

    def watched(event: "GenerateEvent") -> None:
        nonlocal shown
        shown = shown or on_event is _show
        on_event(event)

    try:
        return asyncio.run(_ask(server, request, timeout_s, watched))
    finally:
        if shown:
            print(flush=True)


async def _ask(server: str, request: "GenerateRequest", timeout_s: float | None, on_event: OnEvent) -> "list[Answer]":
    async with opt.gateway_client(server) as client:
        return await client.answers(request, on_event=on_event, timeout_s=timeout_s)


def _show(event: "GenerateEvent") -> None:
    sys.stdout.write(event.text)
    sys.stdout.flush()


def _read_line() -> str | None:
    """The user's next line; None at the end."""
    shown = sys.stdin.isatty()
    try:
        line = input("\n> " if shown else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        return decoded(bytes(error.object), "stdin")
    return None if line.strip() == "/exit" else line


def _as_json(answers: "list[Answer]", events: "list[GenerateEvent]") -> dict[str, Any]:
    """The answer; where there are several, the first one, and all of them as `choices`."""
    made = [_choice(answer, [e for e in events if e.choice == number]) for number, answer in enumerate(answers)]
    whole = {"request_id": events[-1].request_id if events else "", **made[0]}
    return whole if len(made) == 1 else {**whole, "choices": made}


def _choice(answer: "Answer", events: "list[GenerateEvent]") -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    logprobs = [MessageToDict(entry) for event in events for entry in event.logprobs]
    of_prompt = [MessageToDict(entry) for entry in answer.prompt_logprobs]
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish,
        "usage": {"prompt_tokens": answer.usage.prompt_tokens, "output_tokens": answer.usage.output_tokens},
        "seed": answer.timings.seed,
        "ttft_ms": answer.ttft_ms,
        "itl_ms": answer.itl_ms,
        "handover_ms": answer.handover_ms,
        "timings": MessageToDict(answer.timings, preserving_proto_field_name=True),
        **({"stop_text": answer.stop_text} if answer.stop_text else {}),
        **({"logprobs": logprobs} if logprobs else {}),
        **({"prompt_logprobs": of_prompt} if of_prompt else {}),
    }


def _stats(answer: "Answer") -> str:
    from ..client.measures import figures_of, human_bytes

    figures = figures_of(answer)
    parts = [
        f"{figures.prompt_tokens} prompt + {figures.output_tokens} output tokens ({answer.finish})",
        f"TTFT {figures.ttft_ms or 0:.0f} ms",
    ]
    if figures.itl_p50_ms is not None:
        parts.append(f"ITL p50 {figures.itl_p50_ms:.1f} ms, p99 {figures.itl_p99_ms:.1f} ms")
    if figures.handover_ms is not None:
        parts.append(f"handover {figures.handover_ms:.1f} ms")
    if figures.ratio is not None:
        wire = human_bytes(figures.kv_bytes_wire)
        parts.append(f"KV {wire} on the wire, {figures.ratio:.2f}x smaller than bf16")
    return " · ".join(parts)
