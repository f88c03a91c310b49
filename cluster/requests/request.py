"""What a client asked for: validated, tokenized, and with every default set. Nothing else reaches the workers."""

import functools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ...kvtransfer.codecs.registry import codec_names
from ...proto.common_pb2 import PRIORITY_STANDARD, Priority
from ...proto.errors import InvalidRequest, NotFound, Unavailable, shown
from ...proto.generation_pb2 import Chat, GenerateRequest, TokenIds
from ...proto.names import check_name
from ...proto.sampling import Sampling, check_token_ids
from ..access.settings import NO_LIMITS, Limits
from ..router.policies import LocalPrefill
from ..router.router import servable_codecs, token_limit
from ..router.routing_table import Limit, RoutingTable
from ..text.chat_input import check_size, conversation_of
from ..text.served import ServedModel

T = TypeVar("T", int, float)


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request that can be served: every default set, every limit kept."""

    request_id: str  # the client's, or drawn
    call_id: str  # unique among all calls, starts with the request id
    prompt_token_ids: list[int]
    sampling: Sampling
    codec: str
    priority: Priority.ValueType = PRIORITY_STANDARD
    tenant: str = ""
    prefix_scope: bytes = b""  # keeps its pages from all other requests; empty: its tenant shares them
    explain: bool = False
    return_prompt_token_ids: bool = False
    choice: int | None = None  # which of `sampling.n` answers this is the request for; None: for all of them
    limits: Limits = NO_LIMITS  # its caller's own, beside those of the gateway
    # Hashes of its pages, by their size and salt, once they were needed; requests for answers to one prompt share it.
    hashed: dict[tuple[int, bytes], bytes] = field(default_factory=dict, compare=False, repr=False)

    @property
    def output_tokens(self) -> int:
        """At most, of all answers that it is for."""
        return self.sampling.max_tokens * (self.sampling.n if self.choice is None else 1)

    @property
    def tokens(self) -> int:
        """Prompt and output at most. The answers to one prompt share it: it counts with the first."""
        return self.output_tokens + (0 if self.choice else len(self.prompt_token_ids))


@dataclass(frozen=True, kw_only=True)
class ValidatedRequest:
    """A request as far as it can be checked without workers."""

    prompt_token_ids: list[int]
    sampling: Sampling


def smaller(limit: T | None, other: T | None) -> T | None:
    """The smaller of two limits; None is no limit."""
    return min((each for each in (limit, other) if each is not None), default=None)


async def validate(request: GenerateRequest, model: ServedModel) -> ValidatedRequest:
    """Checks what depends on the request and the model alone; InvalidRequest or NotFound, as `resolve`."""
    check_name("request_id", request.request_id)
    model.check_name(request.model)
    sampling = _sampling(request, model)
    if request.codec and request.codec not in codec_names():
        raise NotFound(f"no codec {shown(request.codec)}; allowed: {', '.join(sorted(codec_names()))}")
    await _check_grammar(sampling, model)
    tokens = await _tokenize(request, model)
    limit = (model.context_length, model.context_length)
    return ValidatedRequest(prompt_token_ids=tokens, sampling=_fit(sampling, len(tokens), model.context_length, limit))


async def resolve(
    request: GenerateRequest,
    model: ServedModel,
    table: RoutingTable,
    default_codec: str,
    local_prefill: LocalPrefill = "never",
) -> ResolvedRequest:
    """Validates and completes a request; the tokenizer runs in a thread (`text/tokenizing.py`).

    InvalidRequest, NotFound or Unavailable (no workers) with what was wrong and what is allowed.
    """
    request_id = check_name("request_id", request.request_id) or secrets.token_hex(8)
    tenant = check_name("tenant", request.tenant)
    model.check_name(request.model)
    sampling = _sampling(request, model)
    known = set(codec_names())
    if request.codec and request.codec not in known:
        allowed = ", ".join(servable_codecs(table, local_prefill) or sorted(known))
        raise NotFound(f"no codec {shown(request.codec)}; allowed: {allowed}")
    await _check_grammar(sampling, model)
    tokens = await _tokenize(request, model)
    codec = _codec(request.codec or default_codec, servable_codecs(table, local_prefill))
    return ResolvedRequest(
        request_id=request_id,
        call_id=f"{request_id}.{secrets.token_hex(4)}",
        prompt_token_ids=tokens,
        sampling=_fit(sampling, len(tokens), model.context_length, token_limit(table, codec, local_prefill)),
        codec=codec,
        priority=_priority(request.priority),
        tenant=tenant,
        explain=request.explain,
        return_prompt_token_ids=request.return_prompt_token_ids,
    )


def _priority(asked: Priority.ValueType) -> Priority.ValueType:
    if asked not in Priority.values():
        raise InvalidRequest(f"priority is {asked}; allowed: {', '.join(Priority.keys())}")
    return asked or PRIORITY_STANDARD


def _sampling(request: GenerateRequest, model: ServedModel) -> Sampling:
    sampling = Sampling.from_pb(request.sampling).check_vocabulary(model.vocab_size)
    if not request.sampling.HasField("seed"):
        sampling = replace(sampling, seed=secrets.randbits(63))
    return sampling


async def _check_grammar(sampling: Sampling, model: ServedModel) -> None:
    if sampling.grammar is not None:
        await model.check_grammar(sampling.grammar)


def _codec(name: str, servable: Sequence[str]) -> str:
    if not servable:
        raise Unavailable("no pair of prefill and decode workers is ready")
    if name not in servable:
        raise NotFound(f"codec {name!r} is not offered by this cluster; allowed: {', '.join(servable)}")
    return name


async def _tokenize(request: GenerateRequest, model: ServedModel) -> list[int]:
    kind = request.WhichOneof("input")
    if request.continue_final_message and kind != "chat":
        raise InvalidRequest("continue_final_message without a chat; allowed: with the messages of a chat")
    if kind == "tokens":
        return _token_ids(request.tokens, model)
    if kind == "prompt":
        tokens = await _encode(request.prompt, model)
    elif kind == "chat":
        tokens = await encode_chat(request.chat, model, continue_final=request.continue_final_message)
    else:
        raise InvalidRequest("the request has no input; allowed: prompt, chat or tokens")
    if not tokens:
        raise InvalidRequest("the prompt is empty once tokenized; allowed: at least one token")
    return tokens


async def _encode(prompt: str, model: ServedModel) -> list[int]:
    if not prompt:
        raise InvalidRequest("the prompt is empty; allowed: at least one character")
    size = len(prompt.encode())
    _check_bytes("prompt", size, model)
    encode = functools.partial(model.tokenizer.encode, prompt, most_tokens=model.context_length - 1)
    return await model.tokenizer_threads.run(size, encode)


async def encode_chat(chat: Chat, model: ServedModel, *, continue_final: bool) -> list[int]:
    """The token ids of a chat; InvalidRequest for one that is not valid, too large, or too long for the context."""
    size = check_size(chat, model)

    def encode() -> list[int]:
        return model.tokenizer.encode_chat(
            conversation_of(chat, model, continue_final=continue_final),
            most_tokens=model.context_length - 1,
            parse_special=model.limits.parse_special,
        )

    return await model.tokenizer_threads.run(size, encode)


def _check_bytes(what: str, size: int, model: ServedModel) -> None:
    if size > (most := model.limits.max_prompt_bytes):
        raise InvalidRequest(f"{what} of {size} bytes; allowed: at most {most}")


def _token_ids(tokens: TokenIds, model: ServedModel) -> list[int]:
    if not tokens.ids:
        raise InvalidRequest("the prompt has no token ids; allowed: at least one")
    _check_length(len(tokens.ids), model.context_length)
    ids = list(tokens.ids)
    check_token_ids("tokens", ids, model.vocab_size)
    return ids


def _check_length(prompt: int, context: int) -> None:
    if prompt >= context:
        raise InvalidRequest(
            f"prompt of {prompt} tokens; allowed: at most {context - 1} (the model's context is {context})"
        )


def _fit(sampling: Sampling, prompt: int, context: int, limit: Limit) -> Sampling:
    """Cuts max_tokens to what the context and the largest worker leave; InvalidRequest where nothing is."""
    _check_length(prompt, context)
    longest_prompt, longest_total = limit
    if prompt > longest_prompt:
        raise InvalidRequest(f"prompt of {prompt} tokens; allowed: at most {longest_prompt} (what a worker can hold)")
    room = min(context, longest_total) - prompt
    most = min(sampling.max_tokens, room)
    return replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))
