"""Fields of requests as the `SamplingParams` and priority of the wire."""

import json
from typing import Any

from ....proto.common_pb2 import (
    PRIORITY_BATCH,
    PRIORITY_INTERACTIVE,
    PRIORITY_UNSPECIFIED,
    Choices,
    Grammar,
    Priority,
    SamplingParams,
)
from ....proto.sampling import MAX_SEED
from ...access.settings import PRIORITIES
from ..call import Call
from ..errors import BadField
from .schema.fields import SamplingFields
from .schema.requests import ChatRequest, CompletionRequest

# Those that are named, and mean, the same on the wire.
_SAME = (
    *("n", "min_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "prompt_logprobs"),
)


def sampling_of(call: Call, body: SamplingFields, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """How the answers to a request are drawn. BadField where fields do not go together."""
    field, grammar = grammar_of(body)
    call.name_fields(grammar=field)
    sampling = SamplingParams(
        **{name: value for name in _SAME if (value := getattr(body, name)) is not None},
        max_tokens=max_tokens,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        logit_bias=_biases(body.logit_bias or {}),
        grammar=grammar,
    )
    if body.top_k is not None:
        sampling.top_k = max(0, body.top_k)
    if body.seed is not None:
        sampling.seed = body.seed & MAX_SEED
    if logprobs is not None:
        sampling.logprobs = logprobs
    return sampling


def priority_of(body: SamplingFields) -> Priority.ValueType:
    """The priority that a request asks for."""
    if isinstance(body.priority, str):
        return PRIORITIES[body.priority]
    number = body.priority or 0
    return PRIORITY_INTERACTIVE if number < 0 else PRIORITY_BATCH if number > 0 else PRIORITY_UNSPECIFIED


def grammar_of(body: SamplingFields) -> tuple[str, Grammar | None]:
    """What the output must be, and the field that says so; BadField where two do."""
    found = [(name, grammar) for name, grammar in _grammars(body) if grammar is not None]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise BadField(f"{names} both say what the output must be; allowed: one of them", found[1][0])
    return found[0] if found else ("", None)


def most_tokens(body: ChatRequest, default: int) -> int:
    """The most that the output of a chat may have."""
    if body.max_tokens == 0:
        raise BadField("max_tokens is 0; allowed: 1 or more", "max_tokens")
    asked = (body.max_completion_tokens, body.max_tokens)
    if None not in asked and asked[0] != asked[1]:
        raise BadField("max_tokens is not max_completion_tokens; allowed: one of them", "max_tokens")
    found = asked[0] or asked[1] or default
    return max(found, body.min_tokens or 0) if asked == (None, None) else found


def chat_logprobs(body: ChatRequest) -> int | None:
    """How many top log-probabilities a chat asks for; None: not even of the chosen token."""
    if body.top_logprobs and not body.logprobs:
        raise BadField("top_logprobs without logprobs; allowed: with logprobs: true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def check_completion(body: CompletionRequest) -> None:
    """BadField where fields of a completion do not go together."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise BadField("best_of is not n; allowed: as many as n, for all of them are answered", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise BadField("max_tokens is 0; allowed: 1 or more, or 0 with echo", "max_tokens")


def _grammars(body: SamplingFields) -> list[tuple[str, Grammar | None]]:
    form, outputs = body.response_format, body.structured_outputs
    found: list[tuple[str, Grammar | None]] = [
        ("guided_json", _schema(body.guided_json)),
        ("guided_regex", _regex(body.guided_regex)),
        ("guided_choice", _choice(body.guided_choice)),
        ("guided_grammar", _lark(body.guided_grammar)),
    ]
    if form is not None and form.type != "text":
        schema = form.json_schema.schema_ if form.json_schema is not None else None
        found.append(("response_format", _schema(schema) or Grammar(json_object=True)))
    if outputs is not None:
        of_outputs = (
            _schema(outputs.json_),
            _regex(outputs.regex),
            _choice(outputs.choice),
            _lark(outputs.grammar),
            Grammar(json_object=True) if outputs.json_object else None,
        )
        found += [("structured_outputs", grammar) for grammar in of_outputs]
    return found


def _schema(schema: dict[str, Any] | str | None) -> Grammar | None:
    if schema is None:
        return None
    return Grammar(json_schema=schema if isinstance(schema, str) else json.dumps(schema))


def _regex(regex: str | None) -> Grammar | None:
    return None if regex is None else Grammar(regex=regex)


def _choice(texts: list[str] | None) -> Grammar | None:
    return None if texts is None else Grammar(choices=Choices(texts=texts))


def _lark(grammar: str | None) -> Grammar | None:
    return None if grammar is None else Grammar(lark=grammar)


def _biases(biases: dict[str, float]) -> dict[int, float]:
    for token in biases:
        if not token.isdecimal() or len(token) > 10 or int(token) >= 1 << 32:
            raise BadField(f"logit_bias has the token id {token[:20]!r}; allowed: numbers from 0 on", "logit_bias")
    return {int(token): bias for token, bias in biases.items()}
