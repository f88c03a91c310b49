"""Gets the KV of one prompt from a prefill worker: tries the candidates in order, refuses what does not match."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from ..kernels.shapes import LayerShape
from ..kvtransfer.codecs.registry import PageCodec
from ..kvtransfer.encoded import raw_bytes
from ..kvtransfer.frame import BF16, PROTOCOL_VERSION, Binding
from ..kvtransfer.hashing import page_salt, prompt_hash
from ..kvtransfer.receiver import KvReceiver, ReceivedSection
from ..model.sampling import SampledToken
from ..proto.common_pb2 import TransferStats
from ..proto.decode_pb2 import DecodeRequest
from ..proto.errors import (
    Corrupt,
    EngineFailed,
    Exhausted,
    Expired,
    Incompatible,
    InvalidRequest,
    Lost,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from ..proto.prefill_pb2 import FirstToken, KvFrame, PrefillEvent, PrefillRequest
from ..proto.prefill_pb2_grpc import PrefillStub
from ..proto.rpc.statuses import error_of
from ..proto.rpc.trace import TraceContext
from ..proto.rpc.transport import Transport

if TYPE_CHECKING:
    from ..proto.prefill_pb2_grpc import PrefillAsyncStub
from .engine import DecodeEngine
from .sequence import DecodeSequence, PromptReport

# Answers of a prefill worker as they are told: the first two are final, for another one would say the same; after the
# rest, as after everything else, the next one is asked.
_KNOWN = (InvalidRequest, Expired, Exhausted, Incompatible, NotFound)
LOSSES = 2  # of prefill workers, with no word, over one request: no further one is risked before the gateway knows
SILENCE_S = 10.0  # of a prefill worker, which says each second that it goes on; a slow link may hold that back


IDLE_PEERS = 64  # channels kept open with no call: prefill workers come and go, each start at another port


@dataclass
class _Peer:
    channel: grpc.aio.Channel
    calls: int = 0


class PrefillPeers:
    """Channels to prefill workers: one for each address, kept while it is used and as one of the last used."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._peers: dict[str, _Peer] = {}  # the one unused for longest is first

    def __len__(self) -> int:
        return len(self._peers)

    @contextlib.asynccontextmanager
    async def calling(self, address: str) -> "AsyncIterator[PrefillAsyncStub]":
        """Around a call of the worker at that address."""
        peer = self._peers.pop(address, None) or _Peer(self._transport.dial(address, "prefill"))
        self._peers[address] = peer
        peer.calls += 1
        try:
            yield PrefillStub(peer.channel)
        finally:
            peer.calls -= 1
            idle = [address for address, peer in self._peers.items() if not peer.calls]
            for unused in [self._peers.pop(address) for address in idle[: max(0, len(idle) - IDLE_PEERS)]]:
                await unused.channel.close()

    async def close(self) -> None:
        """Closes all of them."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            await peer.channel.close()


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Everything that one request's transfer needs; `run` does it."""

    engine: DecodeEngine
    peers: PrefillPeers
    sequence: DecodeSequence
    request: DecodeRequest
    codec: PageCodec
    layers: Sequence[LayerShape]
    page_tokens: int
    counters: Counter[str]
    trace: TraceContext  # of the request, for the next hop
    prompt_report: PromptReport
    # Passes it on, with what is known of the transfer by then; returns whether the output ends with it.
    on_first_token: Callable[[FirstToken, TransferStats], Awaitable[bool]]

    async def run(self, time_left: Callable[[], float | None]) -> TransferStats | None:
        """Receives the prompt's KV; the sequence joins the batch at the end.

        Returns the transfer's statistics, or None where the output ended with the first token. A candidate that
        cannot be reached, refuses for lack of room or sends corrupt frames is followed by the next; a corrupt
        transfer is tried once more where there is no other. A prefill engine that failed over this very request is no
        reason to ask the next one: `EngineFailed` is for the gateway to judge, and so are LOSSES workers that went away
        over it and did not say why. Where the request names none, or none is left and it
        allows that, the engine computes the prompt here: the statistics then lack what is known only with the first
        token (see `finish_local`). Otherwise the last candidate's error where none is left.
        """
        first: list[FirstToken] = []
        if not self.request.prefill_addresses:
            return self._compute_here(first, 1)
        candidates = list(self.request.prefill_addresses)
        if len(candidates) == 1:
            candidates *= 2
        error: Exception = Unavailable("no prefill worker was asked")
        lost = 0
        for attempt, address in enumerate(candidates, start=1):
            if attempt > 1 and not isinstance(error, Corrupt) and address == candidates[0]:
                break  # only a corrupt transfer is worth a second try with the same worker
            try:
                return await self._attempt(attempt, address, first, time_left())
            except (Corrupt, Unavailable, Exhausted, Incompatible, NotFound, PermissionDenied) as failed:
                self.counters["transfers_failed"] += 1
                lost += isinstance(failed, Lost)
                if isinstance(failed, EngineFailed) or lost >= LOSSES:
                    raise
                self.counters["frames_refused"] += isinstance(failed, Corrupt)
                error = failed
        if self.request.allow_local_prefill:
            self.counters["prefills_taken_over"] += 1
            return self._compute_here(first, len(candidates) + 1)
        raise error

    def _compute_here(self, first: list[FirstToken], attempt: int) -> TransferStats:
        self.engine.compute(self.sequence, first[0].token_id if first else None)
        return TransferStats(
            attempt=attempt,
            held_tokens=self.sequence.cached_tokens,
            local_tokens=len(self.sequence.prompt) - self.sequence.cached_tokens,
            first_token_unix_ns=first[0].sampled_unix_ns if first else 0,
        )

    async def _attempt(
        self, attempt: int, address: str, first: list[FirstToken], timeout_s: float | None
    ) -> TransferStats | None:
        async with self.peers.calling(address) as stub:
            return await self._receive(stub, attempt, address, first, timeout_s)

    async def _receive(
        self,
        stub: "PrefillAsyncStub",
        attempt: int,
        address: str,
        first: list[FirstToken],
        timeout_s: float | None,
    ) -> TransferStats | None:
        receiver = KvReceiver(
            self._binding(attempt),
            self.codec,
            self.layers,
            self.page_tokens,
            len(self.sequence.prompt),
            self.sequence.cached_tokens,
            self.sequence.sampling.prompt_logprobs,
            self.sequence.forks,
        )
        known = TransferStats(partial=True, attempt=attempt, held_tokens=self.sequence.cached_tokens)
        call = stub.Prefill(self._request(attempt), timeout=timeout_s, metadata=self.trace or None)
        begun = False
        tail_s, tail_bytes = 0.0, 0  # since the first token: nothing but the link holds these frames back
        try:
            while isinstance(event := await _next_event(call, address), PrefillEvent):
                begun = True
                if event.HasField("accepted"):
                    known.prefill_worker = event.accepted.worker_id
                elif event.HasField("frame"):
                    sections = receiver.accept(event.frame)
                    self._count(known, event.frame, sections)
                    await self.engine.deliver(self.sequence, receiver, sections)
                    tail_bytes += len(event.frame.payload)
                elif event.HasField("prompt_logprobs"):
                    receiver.check_prompt_logprobs(event.prompt_logprobs)
                    await self.prompt_report.pass_on(event.prompt_logprobs.first, event.prompt_logprobs.logprobs)
                elif event.HasField("first_token"):
                    receiver.check_first(event.first_token)
                    tail_s, tail_bytes = time.monotonic(), 0
                    if await self._take_first(event, first, known):
                        return None
                elif event.HasField("commit"):
                    receiver.finish(event.commit)
                    self.engine.rates.add_transfer(address, tail_bytes, time.monotonic() - tail_s)
                    if not first:
                        raise Corrupt("the commit came before the first token")
                    self.engine.complete(self.sequence, first[0].token_id, _for_forks(first[0]))
                    stats = event.commit.stats
                    stats.held_tokens = self.sequence.cached_tokens
                    stats.first_token_unix_ns = first[0].sampled_unix_ns  # of the attempt whose token was passed on
                    return stats
            raise Corrupt("the stream ended with no commit")
        except grpc.aio.AioRpcError as error:
            raise _as_ours(address, error, begun=begun) from error
        finally:
            call.cancel()

    def _count(self, known: TransferStats, frame: KvFrame, sections: Sequence[ReceivedSection]) -> None:
        known.frames += 1
        known.kv_bytes_wire += frame.ByteSize()
        for section in sections:
            known.kv_bytes_bf16 += raw_bytes(self.layers[section.header.layer], section.header.tokens, BF16)

    async def _take_first(self, event: PrefillEvent, first: list[FirstToken], known: TransferStats) -> bool:
        """Passes the first token on; a later attempt must draw the same one, and it is not passed on again.

        Output of a lost decode worker holds it already.
        """
        token = event.first_token
        if first:
            if token.token_id != first[0].token_id:
                raise Corrupt("a second prefill worker drew another first token")
            return False
        first.append(token)
        known.first_token_unix_ns = token.sampled_unix_ns
        return False if self.request.emitted_token_ids else await self.on_first_token(token, known)

    def _binding(self, attempt: int) -> Binding:
        fingerprint = self.request.model_fingerprint
        own = (self.request.tenant, self.request.prefix_scope)
        salt = page_salt(fingerprint, self.codec.name, self.codec.params_hash, *own)
        return Binding(
            request_id=self.request.request_id,
            attempt=attempt,
            model_fingerprint=fingerprint,
            codec=self.codec.name,
            codec_hash=self.codec.params_hash,
            prompt_hash=prompt_hash(self.sequence.prompt, salt),
        )

    def _request(self, attempt: int) -> PrefillRequest:
        return PrefillRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=self.request.request_id,
            attempt=attempt,
            model_fingerprint=self.request.model_fingerprint,
            codec=self.codec.name,
            codec_hash=self.codec.params_hash,
            page_tokens=self.page_tokens,
            prompt_token_ids=self.sequence.prompt,
            page_hashes=self.request.page_hashes,
            held_pages=self.sequence.cached_tokens // self.page_tokens,
            sampling=self.request.sampling,
            priority=self.request.priority,
            tenant=self.request.tenant,
            prefix_scope=self.request.prefix_scope,
            resumes=bool(self.request.emitted_token_ids),
            alone=self.request.alone,
            forks=self.sequence.forks,
        )


def _for_forks(first: FirstToken) -> tuple[SampledToken, ...]:
    drawn = ((token.token_id, token.logprobs if token.HasField("logprobs") else None) for token in first.of_forks)
    return tuple(SampledToken.from_pb(*token) for token in drawn)


def finish_local(stats: TransferStats, sequence: DecodeSequence) -> None:
    """Completes the statistics of a prompt that was computed here, once its first token is drawn."""
    timing = sequence.timing
    if stats.local_tokens and timing.sampled_unix_ns:
        stats.queue_ms = (timing.began_s - sequence.arrived_s) * 1e3
        stats.prefill_ms = (timing.sampled_s - timing.began_s) * 1e3
        stats.first_token_unix_ns = timing.sampled_unix_ns


async def _next_event(call: Any, address: str) -> object:
    """What comes next, no PrefillEvent at the end; Unavailable where the other side shows no sign of life."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await call.read()
    except TimeoutError:
        raise Lost(f"prefill worker {address} gives no sign of life for {SILENCE_S:g} s") from None


def _as_ours(address: str, error: grpc.aio.AioRpcError, *, begun: bool) -> Exception:
    """The error for what a prefill worker answered; one that had not `begun` did not die of the request."""
    known = error_of(error, f"prefill worker {address}")
    if isinstance(known, _KNOWN):
        return known
    if not begun or error.code() is not grpc.StatusCode.UNAVAILABLE:
        return Unavailable(str(known))
    if isinstance(known, EngineFailed):
        known.at = known.at or address
    return known
