"""No worker gets a request before it has shown that it works: a canary moves real pages, and what the decode worker
makes of them is compared with what it computes itself from the same prompt.

A new worker (or one that was started anew, or flipped) is paired with one that is verified, or, where there is none,
with another new one: the first pair verifies each other. A failure is in the status, in one line, and is tried again;
the worker stays out until a canary succeeds.
"""

import asyncio
import logging
import random
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc
import grpc.aio

from ...kvtransfer.frame import PROTOCOL_VERSION
from ...kvtransfer.hashing import page_hashes, page_salt
from ...proto.backoff import backoff_s
from ...proto.common_pb2 import PRIORITY_STANDARD, SamplingParams, TokenLogprobs, TransferStats
from ...proto.decode_pb2 import DecodeEvent, DecodeRequest
from ...proto.decode_pb2_grpc import DecodeStub
from ...proto.errors import EngineFailed
from ...proto.rpc.statuses import error_of
from ...proto.tasks import Tasks
from ...proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerReport
from ..text.served import ServedModel
from .registry import Fleet

log = logging.getLogger(__name__)

PAGES = 3  # full ones of a canary's prompt: with three, one of them is packed; a partial one follows
TOKENS, FLIPPED_TOKENS = 4, 2  # that a canary draws, greedily; the second one looks at moved pages
TIMEOUT_S = 20.0  # of one canary request
HOLD_S = 5.0  # that the requests of a canary wait together, at most, for answers whose worker failed
LOOK_S = 0.25  # between two looks at whether they still have to
PATIENCE = 2  # canaries without an answer before a worker is called unfit: a machine may be busy
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 15.0
TOP = 20  # likeliest tokens that the local computation tells
NEAR_TIE = 0.1  # natural log: so close may two tokens be that exact transfers differ in, by rounding

TENANTS = ("preflight.moved", "preflight.local")  # apart: the local computation shall find no page of the other


class _Failed(Exception):
    """A canary that went wrong; the text says how. `by`: the address of the one whose engine died, if one did."""

    by = ""


@dataclass
class _Told:
    """What a decode worker answered to one canary."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    transfer: TransferStats = field(default_factory=TransferStats)


@dataclass
class _Tries:
    """Of one worker that has failed."""

    count: int = 0
    next_s: float = 0.0
    asked: list[str] = field(default_factory=list)  # partners of this round


class Preflight:
    """Verifies the workers of a fleet, as long as it runs; the fleet keeps the verdicts. Belongs to its event loop."""

    def __init__(self, fleet: Fleet, model: ServedModel, failures: "Counter[str] | None" = None) -> None:
        """`failures`: see `Tasks`."""
        self._background = Tasks(failures)
        self._fleet = fleet
        self._model = model
        self._tries: dict[tuple[str, str], _Tries] = {}  # by address and instance

    def start(self) -> None:
        """Begins; `stop` ends it."""
        self._background.start("preflight", self._run, vital=False)  # who is verified goes on without it

    async def stop(self) -> None:
        """Ends the canaries that run."""
        await self._background.stop()

    async def _run(self) -> None:
        running: dict[asyncio.Task[None], tuple[str, str]] = {}
        try:
            while True:
                await self._round(running)
        finally:
            for task in running:
                task.cancel()

    async def _round(self, running: dict[asyncio.Task[None], tuple[str, str]]) -> None:
        """Starts the canaries that are due, and waits for one that ends, or for news of the workers."""
        change = self._fleet.change
        busy = {address for pair in running.values() for address in pair}
        for prefill, decode in self._pairs(busy):
            task = self._background.once("canary", partial(self._check, prefill, decode))
            running[task] = (prefill.address, decode.address)
        waiting = asyncio.ensure_future(change.wait())
        try:
            await asyncio.wait({*running, waiting}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        for task in [task for task in running if task.done()]:
            del running[task]

    def _pairs(self, busy: set[str]) -> list[tuple[WorkerReport, WorkerReport]]:
        """Who shall be checked with whom now: each new worker once, with a verified partner where there is one."""
        now, pairs = time.monotonic(), []
        fresh, verified = self._fleet.to_verify()
        known = {(worker.address, worker.instance) for worker in fresh}
        self._tries = {key: tries for key, tries in self._tries.items() if key in known}
        for worker in fresh:
            tries = self._tries.get((worker.address, worker.instance), _Tries())
            if worker.address in busy or tries.next_s > now:
                continue
            partners = [p for p in verified if _may_meet(worker, p)]
            partners += [p for p in fresh if _may_meet(worker, p) and p.address not in busy]
            if not partners:
                continue
            partner = min(partners, key=lambda p: p.address in tries.asked)  # the first of those not asked yet
            busy.add(worker.address)
            if partner in fresh:
                busy.add(partner.address)
            pair = (worker, partner) if worker.role == WORKER_ROLE_PREFILL else (partner, worker)
            pairs.append(pair)
        return pairs

    async def _check(self, prefill: WorkerReport, decode: WorkerReport) -> None:
        """One canary; both workers are verified by it, or the new ones of the two get its failure as their reason."""
        try:
            await self._canary(prefill, decode)
        except Exception as error:
            reason = str(error) if isinstance(error, _Failed) else "no answer in time"
            if not isinstance(error, _Failed | TimeoutError | KeyError):
                self._background.note("canary", error, f"{prefill.worker_id} {decode.worker_id}")
                reason = f"a bug of the gateway ({type(error).__name__}); see its log"
            for worker, partner in ((prefill, decode), (decode, prefill)):
                told = isinstance(error, _Failed) and error.by in ("", worker.address)
                unexpected = not isinstance(error, _Failed | TimeoutError | KeyError)
                if self._note(worker, partner) >= PATIENCE or told or unexpected:
                    self._fleet.judge(worker, f"its canary with {partner.worker_id} failed: {reason}")
            log.warning(
                "a canary failed",
                extra={"fields": {"prefill": prefill.worker_id, "decode": decode.worker_id, "why": reason}},
            )
            return
        for worker in (prefill, decode):
            self._fleet.judge(worker, None)

    def _note(self, worker: WorkerReport, partner: WorkerReport) -> int:
        """Remembers a failure; how many there were."""
        tries = self._tries.setdefault((worker.address, worker.instance), _Tries())
        tries.count += 1
        tries.next_s = time.monotonic() + backoff_s(tries.count, FIRST_RETRY_S, LAST_RETRY_S)
        if partner.address in tries.asked:
            tries.asked.clear()  # all were asked: from the start
        tries.asked.append(partner.address)
        return tries.count

    async def _canary(self, prefill: WorkerReport, decode: WorkerReport) -> None:
        codecs = [name for name, params in decode.codecs.items() if prefill.codecs.get(name) == params]
        # A process that was seen to compute well shows only that its new role moves pages: a flip is done the sooner.
        flipped = self._fleet.is_flipped(prefill) or self._fleet.is_flipped(decode)
        preferred = (decode.default_codec,) if flipped else ("raw", decode.default_codec)
        wanted = [name for name in dict.fromkeys(preferred) if name in codecs] or codecs[:1]
        prompt, tokens = self._prompt(prefill, decode), FLIPPED_TOKENS if flipped else TOKENS
        local: _Told | None = None
        hold_until_s = time.monotonic() + HOLD_S
        for codec in wanted:
            await self._let_answers_move(hold_until_s)
            asked = [self._ask(decode, codec, prompt, tokens, TENANTS[0], (prefill.address,))]
            if local is None:
                # Side by side: the prefill worker computes while the decode worker does, which is asked for that last,
                # because it takes in no request while it computes.
                asked.append(self._ask(decode, codec, prompt, tokens, TENANTS[1], ()))
            moved, *here = [_result(told) for told in await asyncio.gather(*asked, return_exceptions=True)]
            local = local or here[0]
            if not moved.transfer.kv_bytes_wire or moved.transfer.local_tokens:
                raise _Failed(f"with codec {codec} no page was moved")
            _compare(codec, moved, local)

    async def _let_answers_move(self, until_s: float) -> None:
        """Waits where clients in the middle of their answers wait for the very workers that a canary would occupy.

        With no verified worker of a role they wait for this canary.
        """
        while time.monotonic() < until_s and len({worker.role for worker in self._fleet.to_verify()[1]}) == 2:
            if await self._fleet.moving.wait_over(LOOK_S):
                return

    def _prompt(self, prefill: WorkerReport, decode: WorkerReport) -> list[int]:
        """Random tokens, so that no page of them lies in any cache."""
        page = decode.page_tokens
        room = min(self._model.context_length, decode.pages.total * page) - TOKENS
        length = min(PAGES * page + max(1, page // 8), room, prefill.pages.total * page)
        return random.choices(range(self._model.vocab_size), k=max(1, length))

    async def _ask(
        self,
        decode: WorkerReport,
        codec: str,
        prompt: Sequence[int],
        tokens: int,
        tenant: str,
        prefill: Sequence[str],
    ) -> _Told:
        fingerprint = self._model.fingerprint
        salt = page_salt(fingerprint, codec, decode.codecs[codec], tenant)
        request = DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"preflight.{secrets.token_hex(8)}",
            model_fingerprint=fingerprint,
            codec=codec,
            prompt_token_ids=prompt,
            page_hashes=page_hashes(prompt, decode.page_tokens, salt),
            sampling=SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=TOP, seed=0),
            prefill_addresses=self._fleet.peer_addresses(prefill),
            priority=PRIORITY_STANDARD,
            tenant=tenant,
        )
        told = _Told()
        call = DecodeStub(self._fleet.channel(decode.address)).Generate(request, timeout=TIMEOUT_S)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while isinstance(event := await call.read(), DecodeEvent):
                    told.tokens += event.token_ids
                    told.logprobs += event.logprobs
                    if event.HasField("transfer"):
                        told.transfer = event.transfer
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from None
            how = "computing it locally" if not prefill else f"with codec {codec}"
            failed = _Failed(f"{how}: {error.code().name}: {' '.join((error.details() or '').split())}")
            why = error_of(error)
            if isinstance(why, EngineFailed):
                failed.by = self._fleet.known_as(why.at) if why.at else decode.address
            raise failed from None
        finally:
            call.cancel()
        return told


def _result(told: _Told | BaseException) -> _Told:
    if isinstance(told, BaseException):
        raise told
    return told


def _compare(codec: str, moved: _Told, local: _Told) -> None:
    """Raises _Failed where tokens from moved pages are not those of the local computation, within what a codec loses.

    The first token is drawn by the prefill worker from exact KV. Where a codec is lossy, a later one may be another of
    the likeliest; after a first difference the texts go apart, and nothing more can be compared.
    """
    if len(moved.tokens) != len(local.tokens):
        raise _Failed(f"codec {codec} made {len(moved.tokens)} tokens, local computation {len(local.tokens)}")
    for position, (got, want) in enumerate(zip(moved.tokens, local.tokens, strict=True)):
        if got == want:
            continue
        told = local.logprobs[position] if position < len(local.logprobs) else TokenLogprobs()
        likely = {top.token_id: top.logprob for top in told.top}
        gap = max(likely.values(), default=0.0) - likely[got] if got in likely else float("inf")
        exact = codec == "raw" or position == 0
        if gap > NEAR_TIE if exact else got not in likely:
            where = "the first token" if position == 0 else f"token {position + 1}"
            raise _Failed(f"with codec {codec} {where} is {got}; local computation says {want}")
        return


def _may_meet(one: WorkerReport, other: WorkerReport) -> bool:
    return (
        {one.role, other.role} == {WORKER_ROLE_PREFILL, WORKER_ROLE_DECODE}
        and one.page_tokens == other.page_tokens
        and any(other.codecs.get(name) == params for name, params in one.codecs.items())
    )
