"""One attempt at a request: a call of one decode worker, to the end of the answer or to what ends it before."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc.aio

from ...proto.common_pb2 import TransferStats
from ...proto.decode_pb2 import DecodeEvent, DecodeRequest
from ...proto.decode_pb2_grpc import DecodeStub
from ...proto.errors import Expired, Lost, Unavailable
from ...proto.generation_pb2 import GenerateEvent
from ...proto.rpc.statuses import PeerBug, error_of
from ...proto.rpc.trace import TraceContext
from ..fleet.registry import Fleet
from ..router.router import Placement
from .request import ResolvedRequest
from .session import Session

PassOn = Callable[[GenerateEvent], Awaitable[None]]


class Attempts:
    """Calls decode workers of a fleet, and records in the fleet what it learns of them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def run(
        self,
        session: Session,
        placement: Placement,
        message: DecodeRequest,
        pass_on: PassOn,
        timeout_s: float | None,
        trace: TraceContext,
    ) -> None:
        """One call, to the end of the answer; raises what ended it before. `pass_on` gets every event for the client.

        The call is cancelled in every case.
        """
        worker, lost = placement.decode, False
        replay = bool(message.emitted_token_ids) and message.request_id != session.request.call_id
        try:
            channel = self._fleet.decode_channel(worker)
        except KeyError:
            raise Unavailable(f"decode worker {worker} left") from None
        call = DecodeStub(channel).Generate(message, timeout=timeout_s, metadata=trace or None)
        session.decode_worker = worker
        session.begin_attempt()

        def give_up() -> None:
            nonlocal lost
            lost = True
            call.cancel()

        try:
            with self._fleet.calling(worker, give_up):
                while not session.finished:
                    event = await call.read()
                    if not isinstance(event, DecodeEvent):
                        raise Unavailable(f"decode worker {worker} ended the answer early")
                    if replay:
                        self._fleet.replays.end(session.request.call_id)
                        session.replays, replay = session.replays + 1, False
                    made = session.push(event, time.monotonic())
                    if event.HasField("transfer") and (session.finished or not event.transfer.partial):
                        self._learn(session.request, placement, event.transfer)
                    await pass_on(made)
        except grpc.aio.AioRpcError as error:
            raise _translated(error, worker) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not lost or (task is not None and task.cancelling()):
                raise
            raise Lost(f"decode worker {worker} gives no sign of life") from None
        finally:
            call.cancel()

    def _learn(self, request: ResolvedRequest, placement: Placement, stats: TransferStats) -> None:
        """What a transfer says of the workers: who served, how fast, and what they had cached."""
        table, prompt = self._fleet.table.routing, len(request.prompt_token_ids)
        self._fleet.served(placement.decode)
        table.decode.update_prefix_trust(placement.decode, placement.decode_cached_tokens, stats.held_tokens)
        if stats.local_tokens or not placement.prefill or not stats.attempt:
            return  # no attempt: nothing is known of who served
        for address in placement.prefill[: stats.attempt - 1]:
            self._fleet.failed(address)
        server = placement.prefill[min(stats.attempt, len(placement.prefill)) - 1]
        if stats.partial:  # the answer ended with its first token: bytes, caches and times are unknown
            return self._fleet.served(server)
        table.record_transfer(request.codec, prompt - stats.held_tokens, stats.kv_bytes_wire)
        if stats.attempt == 1:
            found = stats.cached_tokens + stats.stored_tokens + stats.held_tokens
            table.prefill.update_prefix_trust(server, placement.prefill_cached_tokens, found)
        self._fleet.served(server, took_ms=stats.queue_ms + stats.prefill_ms, expected_ms=placement.prefill_ms)


def _translated(error: grpc.aio.AioRpcError, worker: str) -> Exception:
    """The error for the client. What the worker refuses the request for is told in its own words."""
    known = error_of(error)
    if isinstance(known, Expired):
        return Expired("the deadline passed before the answer was finished")
    return error_of(error, f"decode worker {worker}") if isinstance(known, Unavailable | PeerBug) else known
