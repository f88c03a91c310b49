"""A request of the vLLM engine protocol as one of `isthmus.v1.Generation`.

What has no meaning here is refused by name.
"""

import asyncio

from google.protobuf.message import Message
from llguidance.gbnf_to_lark import any_to_lark
from smg_grpc_proto import vllm_engine_pb2 as vllm

from ...proto.common_pb2 import Choices, Grammar, SamplingParams
from ...proto.errors import InvalidRequest
from ...proto.generation_pb2 import GenerateRequest, TokenIds
from ...proto.sampling import MAX_SEED

MAX_GRAMMAR = 1 << 16  # characters of an EBNF grammar that is rewritten here

_REQUEST = frozenset({"request_id", "tokenized", "text", "sampling_params", "stream"})
_SAME = (  # of the same name here, where 0 is "not set" on both sides
    *("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "n"),
)
_OPTIONAL = ("temperature", "max_tokens", "logprobs", "prompt_logprobs")
_CONSTRAINTS = frozenset({"json_schema", "regex", "grammar", "json_object", "choice"})
# How text is made of tokens: whoever sends token ids makes it. A grammar starts with the first token here, always.
_TEXT = (
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "grammar_from_first_token",
)
_SAMPLING = frozenset({*_SAME, *_OPTIONAL, *_TEXT, *_CONSTRAINTS, "stop", "stop_token_ids", "seed", "logit_bias"})


async def translated(request: vllm.GenerateRequest, context_length: int) -> GenerateRequest:
    """The request for `Answering`, which checks all values; InvalidRequest for what it has no field for.

    Without max_tokens an answer may fill the context, as the protocol has it.
    """
    _check_fields(request, _REQUEST)
    _check_fields(request.sampling_params, _SAMPLING)
    made = GenerateRequest(request_id=request.request_id)
    kind = request.WhichOneof("input")
    if kind == "tokenized":
        made.tokens.CopyFrom(TokenIds(ids=request.tokenized.input_ids))
    elif kind == "text":
        made.prompt = request.text
    else:
        raise InvalidRequest("no input; allowed: tokenized, or text")
    made.sampling.CopyFrom(await _sampling(request.sampling_params, context_length))
    return made


def _check_fields(message: Message, known: frozenset[str]) -> None:
    for field, _ in message.ListFields():
        if field.name not in known:
            raise InvalidRequest(f"{field.name} has no meaning here; allowed: {', '.join(sorted(known))}")


async def _sampling(params: vllm.SamplingParams, context_length: int) -> SamplingParams:
    made = SamplingParams(stop=params.stop, stop_token_ids=params.stop_token_ids, max_tokens=context_length)
    for name in _SAME:
        if value := getattr(params, name):
            setattr(made, name, value)
    for name in _OPTIONAL:
        if params.HasField(name):
            value = getattr(params, name)
            if value < 0 and name != "temperature":
                raise InvalidRequest(f"{name} is {value}; allowed: 0 or more")
            setattr(made, name, value)
    if params.HasField("seed"):
        made.seed = params.seed & MAX_SEED  # negative ones too
    for token, bias in params.logit_bias.items():
        if token < 0:
            raise InvalidRequest(f"logit_bias has token id {token}; allowed: 0 or more")
        made.logit_bias[token] = bias
    if (grammar := await _grammar(params)) is not None:
        made.grammar.CopyFrom(grammar)
    return made


async def _grammar(params: vllm.SamplingParams) -> Grammar | None:
    match params.WhichOneof("constraint"):
        case "json_schema":
            return Grammar(json_schema=params.json_schema)
        case "json_object":
            return Grammar(json_object=True) if params.json_object else None
        case "regex":
            return Grammar(regex=params.regex)
        case "choice":
            return Grammar(choices=Choices(texts=params.choice.choices))
        case "grammar":
            return Grammar(lark=await _lark(params.grammar))
        case _:
            return None


async def _lark(ebnf: str) -> str:
    """A grammar in EBNF as GBNF writes it, in Lark's syntax; one in that syntax as it is."""
    if len(ebnf) > MAX_GRAMMAR:
        raise InvalidRequest(f"a grammar of {len(ebnf)} characters; allowed: at most {MAX_GRAMMAR}")
    try:
        return await asyncio.to_thread(any_to_lark, ebnf)
    except Exception as error:  # it raises nothing narrower
        raise InvalidRequest(f"grammar is neither EBNF nor Lark: {error}") from None
