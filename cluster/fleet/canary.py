"""One canary: a request that moves real pages from a prefill to a decode worker. What the decode worker makes of them
is compared with what it computes itself from the same prompt."""

import asyncio
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import grpc.aio

from ...kvtransfer.frame import PROTOCOL_VERSION
from ...kvtransfer.hashing import page_hashes, page_salt
from ...proto.common_pb2 import PRIORITY_STANDARD, SamplingParams, TokenLogprobs, TransferStats
from ...proto.decode_pb2 import DecodeEvent, DecodeRequest
from ...proto.decode_pb2_grpc import DecodeStub
from ...proto.errors import EngineFailed
from ...proto.rpc.statuses import error_of
from .registry import Fleet
from .worker_table import Member

PAGES = 3  # full ones of a canary's prompt: with three, one of them is packed; a partial one follows
TOKENS, FLIPPED_TOKENS = 4, 2  # that a canary draws, greedily; the second one looks at moved pages
TIMEOUT_S = 20.0  # of one canary request
MAX_DELAY_S = 5.0  # that the requests of a canary wait together, at most, for in-flight replays
LOOK_S = 0.25  # between two looks at whether they still have to
TOP = 20  # likeliest tokens that the local computation reports
NEAR_TIE = 0.1  # natural log: so close may two tokens be that exact transfers differ in, by rounding

TENANTS = ("preflight.moved", "preflight.local")  # apart: the local computation shall find no page of the other


class CanaryFailed(Exception):
    """A canary that went wrong; the text says how. `by`: the address of the one whose engine died, if one did."""

    by = ""


class CheckedModel(Protocol):
    """What a canary must know of the model (`cluster/text/served.py`)."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass
class _Answer:
    """What a decode worker answered to one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    transfer: TransferStats = field(default_factory=TransferStats)


class Canary:
    """Checks pairs of workers of a fleet."""

    def __init__(self, fleet: Fleet, model: CheckedModel) -> None:
        self._fleet = fleet
        self._model = model

    async def check(self, prefill: Member, decode: Member) -> None:
        """Returns where the pair works. CanaryFailed, TimeoutError, or KeyError where a worker is gone."""
        codecs = [name for name, params in decode.report.codecs.items() if prefill.report.codecs.get(name) == params]
        # A process that was seen to compute well shows only that its new role moves pages: a flip is done the sooner.
        flipped = self._fleet.table.is_flipped(prefill.address) or self._fleet.table.is_flipped(decode.address)
        default = decode.report.default_codec
        preferred = (default,) if flipped else ("raw", default)
        wanted = [name for name in dict.fromkeys(preferred) if name in codecs] or codecs[:1]
        prompt, tokens = self._prompt(prefill, decode), FLIPPED_TOKENS if flipped else TOKENS
        local: _Answer | None = None
        delayed_until_s = time.monotonic() + MAX_DELAY_S
        for codec in wanted:
            await self._wait_for_replays(delayed_until_s)
            asked = [self._ask(decode, codec, prompt, tokens, TENANTS[0], (prefill.address,))]
            if local is None:
                # Side by side: the prefill worker computes while the decode worker does, which is asked for that last,
                # because it takes in no request while it computes.
                asked.append(self._ask(decode, codec, prompt, tokens, TENANTS[1], ()))
            moved, *here = [_result(answer) for answer in await asyncio.gather(*asked, return_exceptions=True)]
            local = local or here[0]
            if not moved.transfer.kv_bytes_wire or moved.transfer.local_tokens:
                raise CanaryFailed(f"with codec {codec} no page was moved")
            _compare(codec, moved, local)

    async def _wait_for_replays(self, until_s: float) -> None:
        """Waits while clients in the middle of their answers need the very workers that a canary would occupy.

        With no verified worker of a role they wait for this canary.
        """
        while time.monotonic() < until_s and self._both_roles_verified():
            if await self._fleet.replays.wait_none(LOOK_S):
                return

    def _both_roles_verified(self) -> bool:
        _, verified = self._fleet.table.to_verify()
        return len({worker.report.role for worker in verified}) == 2

    def _prompt(self, prefill: Member, decode: Member) -> list[int]:
        """Random tokens, so that no page of them lies in any cache."""
        page = decode.report.page_tokens
        room = min(self._model.context_length, decode.report.pages_total * page) - TOKENS
        length = min(PAGES * page + max(1, page // 8), room, prefill.report.pages_total * page)
        return random.choices(range(self._model.vocab_size), k=max(1, length))

    async def _ask(
        self,
        decode: Member,
        codec: str,
        prompt: Sequence[int],
        tokens: int,
        tenant: str,
        prefill: Sequence[str],
    ) -> _Answer:
        """The decode worker's answer; it computes the prompt itself where `prefill` is empty."""
        fingerprint = self._model.fingerprint
        salt = page_salt(fingerprint, codec, decode.report.codecs[codec], tenant)
        request = DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"preflight.{secrets.token_hex(8)}",
            model_fingerprint=fingerprint,
            codec=codec,
            prompt_token_ids=prompt,
            page_hashes=page_hashes(prompt, decode.report.page_tokens, salt),
            sampling=SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=TOP, seed=0),
            prefill_addresses=self._fleet.table.peer_addresses(prefill),
            priority=PRIORITY_STANDARD,
            tenant=tenant,
        )
        answer = _Answer()
        call = DecodeStub(self._fleet.decode_channel(decode.address)).Generate(request, timeout=TIMEOUT_S)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while isinstance(event := await call.read(), DecodeEvent):
                    answer.tokens += event.token_ids
                    answer.logprobs += event.logprobs
                    if event.HasField("transfer"):
                        answer.transfer = event.transfer
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from None
            how = "computing it locally" if not prefill else f"with codec {codec}"
            failed = CanaryFailed(f"{how}: {error.code().name}: {' '.join((error.details() or '').split())}")
            why = error_of(error)
            if isinstance(why, EngineFailed):
                failed.by = self._fleet.table.address_of_peer(why.at) if why.at else decode.address
            raise failed from None
        finally:
            call.cancel()
        return answer


def _result(answer: _Answer | BaseException) -> _Answer:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _compare(codec: str, moved: _Answer, local: _Answer) -> None:
    """Raises CanaryFailed where tokens from moved pages are not those of the local computation, within what a codec
    loses.

    The first token is drawn by the prefill worker from exact KV. Where a codec is lossy, a later one may be another of
    the likeliest; after a first difference the texts go apart, and nothing more can be compared.
    """
    if len(moved.tokens) != len(local.tokens):
        raise CanaryFailed(f"codec {codec} made {len(moved.tokens)} tokens, local computation {len(local.tokens)}")
    for position, (got, want) in enumerate(zip(moved.tokens, local.tokens, strict=True)):
        if got == want:
            continue
        logprobs = local.logprobs[position] if position < len(local.logprobs) else TokenLogprobs()
        likely = {top.token_id: top.logprob for top in logprobs.top}
        gap = max(likely.values(), default=0.0) - likely[got] if got in likely else float("inf")
        exact = codec == "raw" or position == 0
        if gap > NEAR_TIE if exact else got not in likely:
            where = "the first token" if position == 0 else f"token {position + 1}"
            raise CanaryFailed(f"with codec {codec} {where} is {got}; local computation says {want}")
        return
